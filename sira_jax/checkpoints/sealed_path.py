"""How a checkpoint gets its final name: with the checksums of its files in it, so that none exists without them."""

import asyncio
from pathlib import Path

from orbax.checkpoint import path as ocp_path

from sira_jax.checkpoints import checksums


class SealedPath(ocp_path.atomicity.AtomicRenameTemporaryPath):
    """Orbax's temporary folder, whose files are hashed in the saving thread before it is renamed.

    Only the process that renames it calls `finalize`, after all processes have written their files.
    """

    async def finalize(self) -> None:
        """Writes the checksums, then renames."""
        # Orbax would add the time of the commit to its own file after this; it does without.
        store, self._checkpoint_metadata_store = self._checkpoint_metadata_store, None
        if store is not None:
            await asyncio.to_thread(store.wait_until_finished)
        folder = Path(str(self.get()))
        await asyncio.to_thread(checksums.write, folder)
        await super().finalize()
