"""The HTTP routes, one file for each subject."""

from rollout_service.http.routes import (
    batches,
    fleet,
    generate,
    models,
    openai,
    pausing,
    probes,
    rollouts,
    server,
    status,
    updates,
    weights,
)

MODULES = (
    rollouts,
    batches,
    weights,
    models,
    openai,
    generate,
    status,
    probes,
    fleet,
    pausing,
    updates,
    server,
)
"""every module with a `router`, in the order of the documents"""
