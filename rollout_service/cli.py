"""The command line: `rollout-service launch | calibrate | compare | audit | selftest | patches`."""

import sys

USAGE = """usage: rollout-service COMMAND [--config FILE] [--FIELD VALUE ...] [--dry-run] [--help]

commands:
  launch    serve a policy for rollouts: a fleet of vLLM engines behind one HTTP endpoint
  calibrate measure what a step costs and how many drafts are accepted; choose the draft length for each batch size
  compare   compare acceptance, speed and losslessness of drafters on one policy; exit with 1 if a row is not lossless
  audit     test, setting by setting, that drafters do not change what is sampled; exit with 1 if they do
  selftest  check in two minutes that this machine samples rightly; prints a table for a bug report
  patches   list every function of vLLM that is replaced or wrapped, why, and whether that is still needed

Every field of a command's TOML file is a flag of the same name; `rollout-service COMMAND --help` lists them.
"""


def main() -> None:
    command, argv = (sys.argv[1] if len(sys.argv) > 1 else "--help"), sys.argv[2:]
    if command == "launch":
        from drafters.settings import read_command_line
        from rollout_service.config import ServiceConfig
        from rollout_service.lossless import described

        config = read_command_line(ServiceConfig, "rollout-service launch", argv, epilog=described())
        from rollout_service.imports import uncollected

        with uncollected():
            from rollout_service.serve import launch

        launch(config)
    elif command == "calibrate":
        from drafters.settings import read_command_line
        from rollout_service.evaluation.calibrate_config import CalibrateConfig

        calibrate_config = read_command_line(CalibrateConfig, "rollout-service calibrate", argv)
        from rollout_service.evaluation.calibrate import calibrate

        calibrate(calibrate_config)
    elif command == "compare":
        from drafters.settings import read_command_line
        from rollout_service.evaluation.compare_config import CompareConfig

        compare_config = read_command_line(CompareConfig, "rollout-service compare", argv)
        from rollout_service.evaluation.compare import compare

        compare(compare_config)
    elif command == "audit":
        from drafters.settings import read_command_line
        from rollout_service.evaluation.audit_config import AuditConfig

        audit_config = read_command_line(AuditConfig, "rollout-service audit", argv)
        from rollout_service.evaluation.audit import audit

        audit(audit_config)
    elif command == "selftest":
        from drafters.settings import read_command_line
        from rollout_service.evaluation.selftest_config import SelftestConfig

        selftest_config = read_command_line(SelftestConfig, "rollout-service selftest", argv)
        from rollout_service.evaluation.selftest import selftest

        selftest(selftest_config)
    elif command == "patches":
        from rollout_service.vllm_plugin.table import listing

        print(*listing(), sep="\n")
    elif command in ("--help", "-h"):
        print(USAGE, end="")
    else:
        sys.exit(f"rollout-service: unknown command {command!r}\n\n{USAGE}")
