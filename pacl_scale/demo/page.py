"""The page itself, by NiceGUI: everything it needs comes from this server, and nothing is reported to anybody."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from nicegui import app, events, run, ui
from starlette.middleware.trustedhost import TrustedHostMiddleware

from pacl_scale import log
from pacl_scale.demo.guard import Guard, hosts_for
from pacl_scale.demo.studio import Answer, Sheet, Studio, as_url, drawn, words_in
from pacl_scale.errors import UserError
from pacl_scale.evaluate import overlay

TITLE = "Words in, masks out"
ALL_WORDS = "all words"
PRIMARY = "#0072b2"
SCORES = 8
"""Words whose scores are told under the pointer, the best first."""

HINT = "Point at the picture, or move there by the arrow keys, to see how well each word fits."
ARROWS = {"ArrowLeft": (-1, 0), "ArrowRight": (1, 0), "ArrowUp": (0, -1), "ArrowDown": (0, 1)}
# Arrow keys would also scroll the page.
KEYS = "event => { if (event.key.startsWith('Arrow')) { event.preventDefault(); emit(event.key); } }"

Result = TypeVar("Result")

STYLE = """
.sheet { max-width: 76rem; margin: 0 auto; padding: 1rem; }
.columns { display: grid; grid-template-columns: minmax(17rem, 22rem) minmax(0, 1fr); gap: 1.6rem; align-items: start; }
@media (max-width: 52rem) { .columns { grid-template-columns: minmax(0, 1fr); } .columns > :last-child { order: -1; } }
@media (max-width: 52rem) { .empty { padding: 1.2rem; } }
.columns > *, .columns .nicegui-column { min-width: 0; width: 100%; }
.swatch { width: 1rem; height: 1rem; border-radius: 4px; border: 1px solid rgb(0 0 0 / .35); flex: none; }
.complaint { border-left: 4px solid #c0392b; padding: .4rem .8rem; }
.empty { border: 2px dashed #999; border-radius: 14px; padding: 4rem 1rem; text-align: center; }
.thumb { cursor: pointer; border-radius: 8px; }
.stage img { border-radius: 8px; }
:focus-visible { outline: 3px solid var(--q-primary); outline-offset: 2px; }
"""

logger = log.get_logger("pacl_scale.demo")


@dataclass
class Visit:
    """One open page: its picture, its words, and the parts that change."""

    studio: Studio
    sheet: Sheet | None = None
    answer: Answer | None = None
    asked: int = 0
    """Number of the latest request; an answer to an earlier one comes too late to be shown."""
    waiting: int = 0
    """Requests that are not answered yet."""
    pointer: tuple[float, float] | None = None
    """Where the pointer was last seen on the picture, in its pixels."""
    marked: bool = False
    """Whether the keyboard moved it there: a ring then shows where."""
    parts: dict[str, Any] = field(default_factory=dict)

    async def take(self, content: bytes, name: str) -> None:
        """Show a picture and look for the words in it."""
        sheet = await self._latest(self.studio.open, content, name)
        if sheet is None:
            return
        self.sheet, self.answer, self.pointer, self.marked = sheet, None, None, False
        self._complain("")
        await self.look()

    async def look(self) -> None:
        """Look for the words that stand in the fields."""
        if self.sheet is None:
            return
        words, rest = words_in(self.parts["words"].value or ""), words_in(self.parts["rest"].value or "")
        if not words:
            self.answer = None
            self.show()
            return
        answer = await self._latest(self.studio.look, self.sheet, words, rest)
        if answer is None:
            return
        self.answer = answer
        alone = len(words) + len(rest) == 1
        self._complain("One word alone gets every pixel: add words, or raise the threshold." if alone else "")
        self._offer(answer)
        self.show()

    async def _latest(self, work: Callable[..., Result], *words: Any) -> Result | None:
        """What ``work`` gives, done beside the page; None where it failed, which is said, or was overtaken."""
        self.asked += 1
        number = self.asked
        self.waiting += 1
        self.parts["busy"].set_visibility(True)
        complaint = ""
        try:
            found = await run.io_bound(work, *words)
        except UserError as error:
            found, complaint = None, str(error)
        except Exception as error:
            # Out of memory, most likely: whoever looks at the page must not be left waiting.
            logger.exception("the page's work failed")
            found = None
            complaint = f"That did not work ({type(error).__name__}); try a smaller picture or fewer words."
        finally:
            self.waiting -= 1
            self.parts["busy"].set_visibility(self.waiting > 0)
        if number != self.asked:
            return None
        if complaint:
            self._complain(complaint)
        return found

    def show(self) -> None:
        """Draw the picture as the controls say."""
        if self.sheet is None:
            return
        word = self.parts["view"].value
        threshold, opacity = float(self.parts["threshold"].value), self.parts["opacity"].value / 100
        chosen = None if word == ALL_WORDS else word
        stage = self.parts["stage"]
        stage.set_source(as_url(drawn(self.sheet, self.answer, threshold, opacity, chosen)))
        stage.set_visibility(True)
        self.parts["empty"].set_visibility(False)
        self._say()
        self._legend(threshold)

    def hover(self, event: events.MouseEventArguments) -> None:
        """Say how well each word fits the place under the pointer."""
        self.pointer, self.marked = (event.image_x, event.image_y), False
        self._say()

    def step(self, event: events.GenericEventArguments) -> None:
        """Move the place whose scores are told by an arrow key, a twentieth of the picture at a time."""
        if self.sheet is None or event.args not in ARROWS:
            return
        width, height = self.sheet.picture.size
        right, down = ARROWS[event.args]
        x, y = self.pointer or (width / 2, height / 2)
        self.pointer = min(max(x + right * width / 20, 0), width - 1), min(max(y + down * height / 20, 0), height - 1)
        self.marked = True
        self._say()

    def _say(self) -> None:
        scores = self.answer.at(*self.pointer) if self.answer is not None and self.pointer is not None else []
        said = "Here: " + ", ".join(f"{word} {score:.2f}" for word, score in scores[:SCORES])
        self.parts["hover"].set_text(said if scores else HINT)
        ring = ""
        if self.marked and self.sheet is not None and self.pointer is not None:
            ring = _ring(self.pointer, self.sheet.picture.size)
        self.parts["stage"].set_content(ring)

    def _offer(self, answer: Answer) -> None:
        """Let the controls offer what the answer holds."""
        view, slider = self.parts["view"], self.parts["threshold"]
        view.set_options([ALL_WORDS, *answer.words], value=view.value if view.value in answer.words else ALL_WORDS)
        # Steps of a hundredth, rounded down, so that the lowest leaves nothing out.
        low, high = int(answer.low * 100 - 1) / 100, int(answer.high * 100 + 1) / 100
        keeps_all = slider.value <= slider.props["min"]
        slider.props["min"], slider.props["max"] = low, high
        slider.update()
        slider.set_value(low if keeps_all else min(max(slider.value, low), high))

    def _legend(self, threshold: float) -> None:
        legend = self.parts["legend"]
        legend.clear()
        if self.answer is None:
            return
        labels_HW = self.answer.labels(threshold)
        with legend:
            for number, (word, colour) in enumerate(
                zip(self.answer.words, overlay.colours(len(self.answer.words)), strict=True)
            ):
                with ui.row().classes("items-center gap-2 no-wrap").props('role="listitem"'):
                    ui.element("i").classes("swatch").style("background: rgb({}, {}, {})".format(*colour))
                    ui.label(f"{word} {100 * float((labels_HW == number).mean()):.1f} %")

    def _complain(self, sentence: str) -> None:
        self.parts["complaint"].set_text(sentence)
        self.parts["complaint"].set_visibility(bool(sentence))


def _ring(place: tuple[float, float], size: tuple[int, int]) -> str:
    """SVG that marks a place, white on black."""
    side = max(size)
    return "".join(
        f'<circle cx="{place[0]:.0f}" cy="{place[1]:.0f}" r="{side / 60:.1f}" fill="none" stroke="{ink}" '
        f'stroke-width="{side / share:.2f}"/>'
        for ink, share in (("black", 150), ("white", 300))
    )


def build(studio: Studio, most_bytes: int) -> None:
    """Lay out one page for whoever opens it."""
    visit = Visit(studio)
    ui.dark_mode(None)
    ui.colors(primary=PRIMARY)
    ui.add_css(STYLE)
    with ui.column().classes("sheet w-full"):
        ui.label(TITLE).classes("text-3xl font-semibold").props('role="heading" aria-level="1"')
        ui.label("Drop a picture and type words: each part takes the colour of the word that fits it best.")
        with ui.element("div").classes("columns w-full"):
            with ui.column().classes("gap-4"):
                _controls(visit, most_bytes)
            with ui.column().classes("gap-3"):
                _stage(visit)
    visit.show()


def _controls(visit: Visit, most_bytes: int) -> None:
    async def uploaded(event: events.UploadEventArguments) -> None:
        content = await event.file.read()
        event.sender.reset()  # type: ignore[attr-defined]
        await visit.take(content, event.file.name)

    def rejected() -> None:
        visit._complain(f"That is no picture, or larger than {most_bytes // 2**20} MB.")

    parts = visit.parts
    upload = ui.upload(
        label="Drop a picture here, or choose one", auto_upload=True, max_file_size=most_bytes, on_upload=uploaded
    )
    upload.on_rejected(rejected).props('accept="image/*" flat bordered').classes("w-full")
    if visit.studio.examples:
        _examples(visit)
    parts["words"] = ui.input("Words, separated by commas", value="person, dog, grass, sky").classes("w-full")
    parts["rest"] = ui.input("Words for the rest, which get no colour").classes("w-full")
    for name in ("words", "rest"):
        parts[name].on("keydown.enter", visit.look).on("blur", visit.look)
    ui.button("Look for them", on_click=visit.look).classes("w-full")
    parts["view"] = ui.select([ALL_WORDS], value=ALL_WORDS, label="Show", on_change=visit.show).classes("w-full")
    for name, label, low, high, value, step in (
        ("opacity", "Opacity of the colours", 0, 100, 55, 1),
        ("threshold", "Leave out below this cosine", -1, 1, -1, 0.01),
    ):
        ui.label(label)
        slider = ui.slider(min=low, max=high, value=value, step=step).props(f'label aria-label="{label}"')
        # Drawing follows the hand at most ten times a second.
        slider.on("update:model-value", visit.show, throttle=0.1, leading_events=False)
        parts[name] = slider


def _examples(visit: Visit) -> None:
    ui.label("Or try one of these")
    with ui.row().classes("gap-2"):
        for path in visit.studio.examples:

            async def chosen(path: Any = path) -> None:
                await visit.take(path.read_bytes(), path.name)

            with ui.button(on_click=chosen).props(f'flat padding="2px" aria-label="Example {path.stem}"'):
                ui.image(path).classes("thumb w-16 h-16")


def _stage(visit: Visit) -> None:
    parts = visit.parts
    parts["complaint"] = ui.label("").classes("complaint").props('role="alert"')
    parts["complaint"].set_visibility(False)
    parts["busy"] = ui.linear_progress(show_value=False).props("indeterminate").classes("w-full")
    parts["busy"].set_visibility(False)
    parts["empty"] = ui.label("No picture yet").classes("empty w-full")
    frame = ui.element("div").classes("w-full").props('tabindex=0 role="application"')
    frame.props('aria-label="The picture; arrow keys move the place whose scores are told"')
    frame.on("keydown", visit.step, js_handler=KEYS)
    with frame:
        stage = ui.interactive_image(on_mouse=visit.hover, events=["mousemove", "click"]).classes("stage w-full")
    stage.props('alt="The picture with the words found in it"')
    frame.bind_visibility_from(stage, "visible")
    stage.set_visibility(False)
    parts["stage"] = stage
    parts["hover"] = ui.label("").classes("min-h-6").props('data-part="hover" role="status"')
    parts["legend"] = ui.row().classes("gap-4").props('role="list" aria-label="Words and their share of the picture"')


def serve(studio: Studio, host: str, port: int, most_bytes: int) -> None:
    """Serve the page until interrupted."""
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts_for(host))
    # A form is a little larger than the file in it.
    app.add_middleware(Guard, most_bytes=most_bytes + 2**16)
    shown = f"[{host}]" if ":" in host else host
    app.on_startup(lambda: print(f"the page is at http://{shown}:{port} (Ctrl-C ends it)", flush=True))
    ui.run(
        lambda: build(studio, most_bytes),
        host=host,
        port=port,
        title=TITLE,
        show=False,
        reload=False,
        show_welcome_message=False,
    )
