//! What was made last, for callers who ask for the same again.

use std::sync::{Arc, Mutex, PoisonError};

/// How many are kept; of more, the one that was not asked for for longest is forgotten.
const KEPT: usize = 16;

/// Values and what they were made from.
#[derive(Debug)]
pub(crate) struct Kept<K, V> {
    made: Mutex<Vec<(K, Arc<V>)>>,
}

impl<K, V> Default for Kept<K, V> {
    fn default() -> Self {
        Self { made: Mutex::default() }
    }
}

impl<K: Clone + PartialEq, V> Kept<K, V> {
    /// The value of `key`, which `make` makes if there is none.
    pub(crate) fn get(&self, key: &K, make: impl FnOnce() -> V) -> Arc<V> {
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        // In the order in which they were asked for, the last one last.
        let entry = match made.iter().position(|(known, _)| known == key) {
            Some(place) => made.remove(place),
            None => (key.clone(), Arc::new(make())),
        };
        if made.len() == KEPT {
            made.remove(0);
        }
        let value = Arc::clone(&entry.1);
        made.push(entry);
        value
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_for_again_is_kept_until_others_came() {
        let kept = Kept::default();
        let first = kept.get(&0, || "first");
        for key in 1..KEPT {
            assert!(!Arc::ptr_eq(&kept.get(&key, || "other"), &first), "another key");
        }
        assert!(Arc::ptr_eq(&kept.get(&0, || "again"), &first), "the same key");
        for key in 1..KEPT {
            kept.get(&(KEPT + key), || "new");
        }
        assert!(Arc::ptr_eq(&kept.get(&0, || "again"), &first), "asked for after those that went");
        for key in 1..=KEPT {
            kept.get(&key, || "new");
        }
        assert_eq!(*kept.get(&0, || "again"), "again", "no more than a number is kept");
    }
}
