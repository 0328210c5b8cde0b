"""The converter under the name of earlier versions. `convert_cc_sbu.py` and `convert_laion.py` each hold all of it."""

from convert_cc_sbu import *  # noqa: F403
