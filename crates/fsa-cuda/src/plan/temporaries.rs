//! What a pass of the whole's forward keeps for itself.

use super::{NsaProblem, Slot, Workspace};
use serde::Serialize;

/// What a pass of a forward keeps where the caller wants no state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(crate) struct ForwardTemporaries {
    pub rotated: Option<[Slot; 2]>,
    /// Of all heads, or of a pass and in the scratch, before stage `selected` has it.
    pub compressed: [Slot; 2],
    /// Of the compressed branch, in the scratch.
    pub lse: Slot,
}

impl ForwardTemporaries {
    /// `before` is the scratch until the blocks are selected. Heads that are compressed at once, and are not those of the pass, stay.
    pub(super) fn new(
        pass: &NsaProblem,
        at_once: &NsaProblem,
        workspace: &mut Workspace,
        before: &mut Workspace,
    ) -> Self {
        let ([query, tokens, _], [_, _, compressed]) = (pass.row_bytes(), at_once.row_bytes());
        let rotated = pass.rope.then(|| [workspace.add("rotated query", query), workspace.add("rotated key", tokens)]);
        let stays = at_once.sizes.num_kv_heads > pass.sizes.num_kv_heads;
        let place = if stays { workspace } else { &mut *before };
        Self {
            rotated,
            compressed: [(); 2].map(|()| place.add("compressed", compressed)),
            lse: before.add("lse", pass.sizes.lse_bytes()),
        }
    }
}
