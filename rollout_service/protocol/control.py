"""Control routes: the paths that change what every client gets, such as a pause or a weight update of several calls."""

CONTROL_PATHS = frozenset({
    "/pause", "/resume", "/is_paused", "/abort_requests", "/inference/v1/abort_requests",
    "/init_weight_transfer_engine", "/shutdown_weight_transfer_engine", "/start_weight_update",
    "/start_draft_weight_update", "/update_weights", "/finish_weight_update", "/update_weight_version", "/weight_info",
    "/weight_checker", "/get_world_size", "/reset_prefix_cache", "/sleep", "/wake_up", "/is_sleeping", "/server_info",
    "/collective_rpc",
})  # fmt: skip
"""exact paths, in vLLM's names; the guard asks for the admin token there"""
