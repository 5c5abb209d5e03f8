"""GET /health, /ready, /metrics, /v1/speculation: how the service is doing."""

from fastapi import APIRouter, Request, Response

from rollout_service.fleet.fleet import Fleet
from rollout_service.http.acceptance_report import speculation_status
from rollout_service.http.json_route import JsonRoute
from rollout_service.protocol import SpeculationStatus

router = APIRouter(tags=["status"], route_class=JsonRoute)


@router.get("/health")
async def health() -> dict[str, str]:
    """The front's process is up."""
    return {"status": "up"}


@router.get("/ready", responses={503: {"model": dict[str, bool], "description": "An engine does not answer"}})
async def ready(request: Request, response: Response) -> dict[str, bool]:
    """200 when every engine is in service and answers, else 503. Engines that are being added or taken away do not
    count. `paused` while a client has paused the service: then nothing is generated until it resumes."""
    fleet: Fleet = request.app.state.fleet
    answers = await fleet.ready()
    response.status_code = 200 if answers else 503
    return {"ready": answers, "paused": fleet.pausing.paused}


class Metrics(Response):
    """In Prometheus' text format."""

    media_type = "text/plain; version=0.0.4; charset=utf-8"


@router.get("/metrics", response_class=Metrics)
async def metrics(request: Request) -> Metrics:
    """Prometheus text: the front's own metrics, and vLLM's metrics of every engine."""
    fleet: Fleet = request.app.state.fleet
    telemetry = request.app.state.telemetry
    telemetry.fleet(fleet.scaling.status())
    telemetry.idle.clear()
    for member in fleet.members:
        telemetry.idle.labels(str(member.index)).set(member.idle_seconds())
    for of in fleet.store.sets:
        telemetry.version.labels(of).set(fleet.store.version(of))
    telemetry.paused.set(fleet.pausing.paused)
    telemetry.batches(request.app.state.background.status())
    await fleet.check_acceptance()
    text = telemetry.exposition(await fleet.metrics())
    return Metrics(text)


@router.get("/v1/speculation")
async def speculation(request: Request) -> SpeculationStatus:
    """Acceptance since the start, by position, weight versions, the drafter's age and context length. Also the draft
    lengths in use with the reason for them, and the alarms."""
    fleet: Fleet = request.app.state.fleet
    rows = await fleet.speculation()
    fleet.alarms.check_acceptance(rows)
    return speculation_status(
        fleet.config.drafter,
        rows,
        fleet.pushes.drafter_since,
        await fleet.context_acceptance(),
        fleet.alarms.raised,
        await fleet.schedules(),
        await fleet.running(),
    )
