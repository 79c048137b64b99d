"""Fixtures of the engine's tests."""

from __future__ import annotations

from tiny_decoders import bases, engine, folder, references

__all__ = ["bases", "engine", "folder", "references"]
