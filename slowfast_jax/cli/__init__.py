# SPDX-License-Identifier: Apache-2.0
"""One file a verb: flags in, one call out."""
