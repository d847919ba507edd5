import sys

from attanchor_vlm.cli import main

sys.exit(main())
