# SPDX-License-Identifier: Apache-2.0
"""The checker of annotations under test: beartype, with an int allowed where a float stands."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
