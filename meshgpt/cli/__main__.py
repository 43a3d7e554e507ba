"""`python -m meshgpt.cli VERB ...`, the same as `meshgpt VERB ...`."""

import sys

from meshgpt.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
