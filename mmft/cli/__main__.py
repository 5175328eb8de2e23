import sys

from mmft.cli import main

sys.exit(main())
