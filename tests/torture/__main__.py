"""The tally: ``python -m tests.torture [--short] [--json] [KIND...]``."""

from tests.torture import all as torture

raise SystemExit(torture.tally(torture.parser().parse_args())[1])
