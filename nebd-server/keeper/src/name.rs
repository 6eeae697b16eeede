//! Names in the store.

/// Longest name.
pub const NAME_BYTES_MAX: usize = 200;

/// Whether a server may store a descriptor under `name`: letters, digits, `.`, `_` and `-`, and
/// not one of the keeper's own.
pub fn is_store_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= NAME_BYTES_MAX
        && !name.starts_with(crate::names::RESERVED)
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked() {
        assert!(is_store_name("s.0123456789abcdef0123456789abcdef.kick0"));
        assert!(is_store_name(&"x".repeat(NAME_BYTES_MAX)));
        for bad in ["", "a:b", "a b", "a\n", "nebd.host", "é", &"x".repeat(NAME_BYTES_MAX + 1)] {
            assert!(!is_store_name(bad), "{bad:?}");
        }
    }
}
