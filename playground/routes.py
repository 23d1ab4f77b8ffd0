"""What the page's server answers: the page itself, what the model is, hints, and drawings.

    GET  /                      the page, one file
    GET  /api/model             the model, its ControlNets, its defaults, the hints of its validation set
    GET  /api/hint?number=N     a hint of the validation set as PNG
    POST /api/hint              the content of an image file -> the hint that it becomes, as PNG; with kind=canny (and
                                its parameters) the hint that an annotator makes of the file's photo
    POST /api/draw              a drawing as JSON -> lines of JSON as they happen: place in the line, steps, pictures

A drawing lives as long as its connection. A browser that is closed, or that cancels, ends it.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import data
from playground.drawing import draw, prepare
from playground.hints import RequestError, annotate_photo, decode_hint, fit_hint, to_png
from playground.jobs import Event, Job, Line
from playground.model import DRAWABLE, LoadedModel
from playground.request import parse_drawing, parse_size
from playground.server import BYTES, Handler, HTTPError
from report.markup import content_policy
from training.images import Reading

PAGE = Path(__file__).with_name("page.html")
HEARTBEAT = 1.0  # seconds after which a line is sent if nothing happens, which also tells whether the browser is there


class Routes:
    """The answers of the page of a loaded model. `line`: where its drawings wait."""

    def __init__(self, loaded: LoadedModel):
        self.loaded, self.description = loaded, loaded.describe()
        self.page = PAGE.read_text(encoding="utf-8")
        self.policy = content_policy(
            self.page, connect_src="'self'", img_src="'self' data: blob:", frame_ancestors="'none'"
        )
        self.line = Line(lambda order, show: draw(loaded, order, show))

    def table(self) -> dict[tuple[str, str], Callable[[Handler], None]]:
        """(method, path) -> function that answers."""
        answers = {
            ("GET", "/"): self.get_page,
            ("GET", "/api/model"): lambda request: request.answer_json(self.description),
            ("GET", "/api/hint"): self.get_hint,
            ("POST", "/api/hint"): self.post_hint,
            ("POST", "/api/draw"): self.post_draw,
        }
        return {place: told(answer) for place, answer in answers.items()}

    def get_page(self, request: Handler) -> None:
        request.answer(
            self.page.encode(), "text/html; charset=utf-8", Content_Security_Policy=self.policy, X_Frame_Options="DENY"
        )

    def get_hint(self, request: Handler) -> None:
        number = request.query.get("number", "")
        hint = self.loaded.hints.read(int(number) if number.isascii() and number.isdigit() and len(number) < 10 else -1)
        if "size" in request.query:
            hint = fit_hint(hint, self.loaded.controls[0].resample, self._size(request))
        request.answer(to_png(hint), "image/png")

    def post_hint(self, request: Handler) -> None:
        place = request.query.get("net", "0")
        if not place.isdigit() or len(place) > 3 or int(place) >= len(self.loaded.controls):
            raise RequestError("There is no such ControlNet.")
        control, size = self.loaded.controls[int(place)], self._size(request)
        kind, channels = request.query.get("kind", ""), control.net.hint_channels
        with request.body(BYTES) as content:
            native = decode_hint(content, Reading(3) if kind else control.reading)
            if kind and channels in DRAWABLE:
                hint = annotate_photo(content, kind, self._parameters(request), channels, size)
            else:
                hint = fit_hint(native, control.resample, size)
        cut = data.fraction_cut(native.shape[1::-1], size)
        request.answer(to_png(hint), "image/png", Fraction_Cut=f"{cut:.4f}")

    def post_draw(self, request: Handler) -> None:
        multiple, nets = self.loaded.model.config.multiple, len(self.loaded.controls)
        order = prepare(self.loaded, parse_drawing(request.json_body(), multiple, nets))
        job = self.line.submit(order)
        del order  # the line keeps it, as long as it waits
        try:
            request.begin(200, "application/x-ndjson")
            for event in events(self.line, job, request):
                request.write_line(event)
        finally:
            job.cancel()

    def _parameters(self, request: Handler) -> dict[str, float]:
        """The numbers of an annotator in the address of a request."""
        given = {name: value for name, value in request.query.items() if name not in ("net", "size", "kind")}
        try:
            return {name: float(value) for name, value in given.items()}
        except ValueError as e:
            raise RequestError("The parameters of an annotator are numbers.") from e

    def _size(self, request: Handler) -> data.Size:
        return parse_size(request.query.get("size"), self.loaded.model.config.multiple)


def events(line: Line, job: Job, request: Handler) -> Iterator[Event]:
    """What there is to tell of a job until it ends. ConnectionError when the browser is gone."""
    yield {"event": "waiting", "place": line.place(job)}
    while True:
        event = job.next(HEARTBEAT)
        if job.cancelled:  # the server ends
            return
        if request.is_gone():
            raise ConnectionError("the browser is gone")
        yield event or {"event": "waiting", "place": line.place(job)}
        if event and event["event"] in ("done", "error"):
            return


def told(answer: Callable[[Handler], None]) -> Callable[[Handler], None]:
    """`answer`, of which a RequestError becomes an answer with its sentence."""

    def answer_or_tell(request: Handler) -> None:
        try:
            answer(request)
        except RequestError as e:
            raise HTTPError(400, str(e)) from e

    return answer_or_tell
