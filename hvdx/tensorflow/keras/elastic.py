"""Elastic training: the same as :mod:`hvdx.keras.elastic`."""

from __future__ import annotations

from hvdx.keras.elastic import *  # type: ignore[import-not-found]  # noqa: F403
