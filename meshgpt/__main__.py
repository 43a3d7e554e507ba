"""`python -m meshgpt VERB ...`, the same as `meshgpt VERB ...`."""

import sys

from meshgpt.cli.verbs import main

if __name__ == "__main__":
    sys.exit(main())
