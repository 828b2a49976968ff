//! The kernel files and which of them a translation unit includes.

/// Every file of `kernels/`: its path there and its text.
pub(super) const FILES: &[(&str, &str)] = include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// Every file of the kernels.
pub(crate) fn files() -> &'static [(&'static str, &'static str)] {
    FILES
}

/// The names that a file includes.
pub(super) fn includes(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter_map(|line| line.strip_prefix("#include \"")?.split('"').next())
}

/// The files that a translation unit includes, itself or through others: a change of one of these is a change of its kernels.
pub(crate) fn headers(source: &str) -> Vec<(&'static str, &'static str)> {
    let mut found = vec![false; FILES.len()];
    let mut texts = vec![source];
    while let Some(text) = texts.pop() {
        for name in includes(text) {
            let file = FILES.iter().position(|(path, _)| *path == name);
            if let Some(file) = file.filter(|file| !std::mem::replace(&mut found[*file], true)) {
                texts.push(FILES[file].1);
            }
        }
    }
    FILES.iter().zip(found).filter(|(_, found)| *found).map(|(file, _)| *file).collect()
}
