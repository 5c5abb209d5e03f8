"""GET and POST /v1/fleet/engines: the engines, and their number while the service runs."""

from fastapi import APIRouter, Request

from rollout_service.http.json_route import JsonRoute
from rollout_service.http.routes.pausing import fleet_of, to_its_end
from rollout_service.protocol import FLEET_PATH, FleetStatus, ScaleEngines

router = APIRouter(tags=["fleet"], route_class=JsonRoute)


@router.get(FLEET_PATH)
async def engines(request: Request) -> FleetStatus:
    """Every engine: its state, and what it has to do."""
    return fleet_of(request).scaling.status()


@router.post(FLEET_PATH)
async def scale(request: Request, body: ScaleEngines) -> FleetStatus:
    """Add engines or take some away, while the service goes on. The answer comes when that is done.

    An engine that is added comes into service with the weights in service. One that is taken away finishes what it runs
    within `drain` seconds; its groups are then generated elsewhere, and event streams break off. 409 says that there is
    no room, or that another change is under way. A push that is under way ends first.
    """
    fleet = fleet_of(request)
    await to_its_end(fleet.scaling.to(body.engines, body.drain))
    return fleet.scaling.status()
