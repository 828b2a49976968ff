//! What the translation unit asserts about structs and constants.

use super::{DECLARED, Declared, RECORD_BYTES, TILE_ROWS, Tile};
use std::fmt::Write;

const _: () = assert!(size_of::<Tile>() == RECORD_BYTES);

/// The assertions of the translation unit about structs and constants.
pub(crate) fn assertions() -> String {
    let mut text = format!("static_assert(TILE_ROWS == {TILE_ROWS}, \"TILE_ROWS\");\n");
    for Declared { name, bytes, fields } in DECLARED {
        let _ = writeln!(text, "static_assert(sizeof({name}) == {bytes}, \"{name}: size\");");
        for (field, offset, bytes) in *fields {
            let place = format!("(({name}*)0)->{field}");
            // NVRTC has no offsetof; this is what its front end makes of it.
            let _ = writeln!(text, "static_assert(__INTADDR__(&{place}) == {offset}, \"{name}.{field}: offset\");");
            let _ = writeln!(text, "static_assert(sizeof({place}) == {bytes}, \"{name}.{field}: size\");");
        }
    }
    text
}
