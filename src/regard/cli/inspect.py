"""``regard inspect``: what do the heads of this model look at?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from regard.cli.app import app, fail, open_console, print_rows
from regard.cli.measuring import INTERRUPTED, progress

if TYPE_CHECKING:
    from regard.inspect.overview import Overview
    from regard.sites.hosts.loading import Loaded, Prepared


@app.command()
def inspect(
    model: Annotated[
        str, typer.Argument(help="A folder, a model of the hub, or timm/NAME; a small BERT if left out.")
    ] = "",
    text: Annotated[str | None, typer.Option(help="The text to read.")] = None,
    file: Annotated[Path | None, typer.Option(help="A file with the text to read.")] = None,
    image: Annotated[Path | None, typer.Option(help="The picture to look at.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for report.html and overview.json.")] = Path("inspect"),
) -> None:
    """Show what every attention head of a pretrained model looks at, on a text or a picture.

    Without a model, the BERT of the extra 'inspect'; without a text, a paragraph about heaps from the standard library.
    Writes report.html, which opens in any browser, and overview.json with the same numbers.
    """
    if sum(given is not None for given in (text, file, image)) > 1:
        fail("--text, --file and --image exclude each other; give one of them")
    if file is not None:
        text = _read(file)
    if text is not None and not text.strip():
        fail("the text is empty; give some words")
    try:
        from regard.report.inspect import DATA, PAGE, dump, page, record, write
        from regard.sites.hosts.loading import load
    except ModuleNotFoundError as error:
        fail(f"{error.name} is missing; pip install 'regard[inspect]'")
    try:
        with progress({"loading": 1.0}) as watch:
            watch("loading", "started")
            loaded = load(model)
            watch("loading", "done")
        prepared = loaded.prepare_image(image) if image else loaded.prepare_text(text)
        found = _look(loaded, prepared)
        source = f"the picture {image.name}" if image else "a text" if file is None else f"the text {file.name}"
        content = record(found, model=loaded.name, input=source)
        report = write(out, PAGE, page(content, prepared.picture))
        data = write(out, DATA, dump(content))
    except KeyboardInterrupt:
        fail("interrupted", INTERRUPTED)
    except ValueError as refusal:
        fail(str(refusal))
    except OSError as error:
        fail(f"{error.filename or out} cannot be written ({error.strerror}); choose another folder with --out")
    rows = [(found.name(note.layer), f"{note.head}", note.role, note.text) for note in found.notable()]
    print_rows(open_console(), "", "Notable heads", ("layer", "head", "role", "what it does"), rows)
    typer.echo(f"\n{report}\n{data}")


def _look(loaded: Loaded, prepared: Prepared) -> Overview:
    from regard import sites
    from regard.inspect.overview import overview

    with progress({site.name: 1.0 for site in sites.find(loaded.model)}) as watch:
        return overview(
            loaded.model,
            prepared.inputs,
            tokens=prepared.tokens,
            target_tokens=prepared.target_tokens,
            watch=watch,
        )


def _read(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        fail(f"--file {file} is no text in UTF-8; a picture goes with --image")
    except OSError as error:
        fail(f"--file {file} cannot be read ({error.strerror}); give the path of a text")
    if not text.strip():
        fail(f"--file {file} is empty; give a text")
    return text
