"""Every test file has one topic: `make test-queue` runs those of the queue. A file without a topic is an error."""

import pytest

TOPICS = {
    "lossless": "audit float64 lossless rl_scoring routed_policy router_ties second_architecture selftest verification",
    "drafters": """acceptance compare_rows cost_report demo_models draft_lengths drafter_files drafter_learners
                   drafter_recipe drafter_training drafters_command drafters_trained exploration idle_drafter latent_moe
                   mx_encoding new_kind online_drafter policy_costs policy_recipe prediction quantised_drafters
                   schedule""",
    "queue": "asynchronous background bad_requests batch_queue fault_record faults soak stored_formats",
    "weights": """control_route lasting loading mapped_update push_route pushes state_folder tensor_bytes transports
                  update_file updates weight_files weight_updates""",
    "http": """access_log admission bearer_token client cors endpoint engine_http front generate guard https
               models_route probes request_ids rollout_record service starting tls tokens tool_parsers tools""",
    "fleet": """alarms cluster_room control deaths fleet_generate frozen_engines head joining_nodes lost_engines
                nodes pausing placement ray_cluster ray_token resources scaled_service scaling silent_engines""",
    "engine": """cache_salt core_process core_server generate_patches gpu_kit hardware law patch_table patches
                 recurrent_layers required_prefix routed_experts runners watched_outputs""",
    "trainer": """chunked_scoring collapsed_experts commands expert_routing extended_files learner_interface
                  learner_memory model_folder padding rl_asynchronous rl_checkpoint rl_command rl_faults rl_learner
                  rl_loop rl_ownership rl_packing rl_pushing rl_sources router_replay run_formats trl_adapter""",
    "losses": "rl_advantages rl_corrections rl_losses",
    "tasks": "grading prompt_lengths rewards_pool rl_rewards rl_tasks tasks text_lines",
    "config": "before_work rl_config settings unread_fields",
    "documents": """architecture cluster_files contributing documents layers quick_start slurm study_report topics
                    troubleshooting""",
}
"""names of test files, without test_"""
OF_FILE = {f"test_{name}": topic for topic, names in TOPICS.items() for name in names.split()}

collect_ignore = ["cuda"]
"""`make test-cuda` runs these, in an environment of their own"""


def pytest_configure(config: pytest.Config) -> None:
    for topic in TOPICS:
        config.addinivalue_line("markers", f"{topic}: `make test-{topic}` runs these")


def pytest_itemcollected(item: pytest.Item) -> None:
    if item.path.stem not in OF_FILE:
        raise pytest.UsageError(f"{item.path}: give it a topic in TOPICS of tests/conftest.py")
    item.add_marker(OF_FILE[item.path.stem])
