//! Golden bytes as text: offset, bytes in the order of memory, field.
//!
//! A line is `0018  0102…  field`; many zeros at a field's end are `00 × 3456`. To write the files
//! anew after a layout was *added*, run the tests with `NEBD_GOLDEN=write`; a file of a released
//! layout never changes.

use std::path::Path;

/// The text of `bytes`, cut into fields of these lengths. The last field takes what is left.
pub fn render(title: &str, bytes: &[u8], fields: &[(usize, &str)]) -> String {
    let mut text = format!("# {title}\n");
    let mut at = 0;
    for (i, (length, field)) in fields.iter().enumerate() {
        let length = if i + 1 == fields.len() { bytes.len() - at } else { *length };
        if length == 0 {
            continue;
        }
        let value = &bytes[at..at + length];
        let zeros = value.iter().rev().take_while(|byte| **byte == 0).count();
        let shown = if zeros > 16 { &value[..length - zeros] } else { value };
        let mut hex: String = shown.iter().map(|byte| format!("{byte:02x}")).collect();
        if shown.len() < length {
            let space = if hex.is_empty() { "" } else { " " };
            hex += &format!("{space}00 × {zeros}");
        }
        text += &format!("{at:04x}  {hex:<32}  {field}\n");
        at += length;
    }
    text
}

/// The bytes of a text.
pub fn parse(text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    for line in text.lines().filter(|line| !line.starts_with('#') && !line.is_empty()) {
        let mut parts = line.split("  ").filter(|part| !part.is_empty()).map(str::trim);
        let (at, hex) = (parts.next().expect("an offset"), parts.next().expect("bytes"));
        assert_eq!(usize::from_str_radix(at, 16), Ok(bytes.len()), "{line}");
        let (hex, zeros) = hex.split_once("00 × ").unwrap_or((hex, "0"));
        let hex = hex.trim();
        bytes.extend(
            (0..hex.len()).step_by(2).map(|i| {
                u8::from_str_radix(&hex[i..i + 2], 16).unwrap_or_else(|_| panic!("{line}"))
            }),
        );
        bytes.resize(bytes.len() + zeros.parse::<usize>().unwrap(), 0);
    }
    bytes
}

/// Compares with the file, or writes it if `NEBD_GOLDEN=write`; returns the bytes that it holds.
pub fn golden(folder: &Path, name: &str, text: &str) -> Vec<u8> {
    let path = folder.join(format!("{name}.hex"));
    if std::env::var_os("NEBD_GOLDEN").is_some_and(|value| value == "write") {
        std::fs::write(&path, text).unwrap();
    }
    let stored = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path:?}: {e}"));
    for (ours, theirs) in text.lines().zip(stored.lines()) {
        assert_eq!(ours, theirs, "{path:?} is a released layout: append, never change");
    }
    assert_eq!(text, stored, "{path:?}");
    parse(&stored)
}
