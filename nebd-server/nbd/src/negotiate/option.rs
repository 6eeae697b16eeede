//! The data of options.

use crate::wire::{self, Cursor, STRING_BYTES_MAX, info};

/// What a client asks about an export, beside what it always gets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Infos {
    pub name: bool,
    pub description: bool,
    pub sizes: bool,
}

/// `INFO` and `GO`: the export's name and what is asked.
pub fn info(data: &[u8]) -> Option<(&str, Infos)> {
    let mut cursor = Cursor(data);
    let length = cursor.u32()? as usize;
    let name = cursor.string(length)?;
    let count = usize::from(cursor.u16()?);
    if cursor.0.len() != 2 * count {
        return None;
    }
    let mut infos = Infos::default();
    while let Some(item) = cursor.u16() {
        match item {
            info::NAME => infos.name = true,
            info::DESCRIPTION => infos.description = true,
            info::BLOCK_SIZE => infos.sizes = true,
            // `EXPORT` comes unasked; unknown ones are ignored.
            _ => {}
        }
    }
    Some((name, infos))
}

/// `LIST_META_CONTEXT` and `SET_META_CONTEXT`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Meta {
    pub option: u32,
    /// Whether the queries match `base:allocation`.
    pub allocation: bool,
}

/// The export's name and what the queries select.
pub fn meta(option: u32, data: &[u8]) -> Option<(&str, Meta)> {
    let is_list = option == wire::option::LIST_META_CONTEXT;
    let mut cursor = Cursor(data);
    let length = cursor.u32()? as usize;
    let name = cursor.string(length)?;
    let count = cursor.u32()?;
    // No query at all lists everything and selects nothing.
    let mut allocation = is_list && count == 0;
    for _ in 0..count {
        let length = cursor.u32()? as usize;
        if length > STRING_BYTES_MAX {
            return None;
        }
        let query = cursor.bytes(length)?;
        allocation |= query == wire::ALLOCATION_CONTEXT.as_bytes();
        allocation |= is_list && query == b"base:";
    }
    cursor.0.is_empty().then_some((name, Meta { option, allocation }))
}
