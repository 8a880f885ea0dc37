from tests.vision_peers import declare

__all__ = ["declare"]
