"""The members of an archive, for tests of sessions and archives."""

from __future__ import annotations

import io
import tarfile


def members(archive: bytes) -> dict[str, bytes]:
    """Map the names of an archive's members to their content."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        files = {member.name: tar.extractfile(member) for member in tar.getmembers()}
        return {name: file.read() for name, file in files.items() if file is not None}
