//! What a client sends, and a server that answers from a table.

#![allow(dead_code)] // Each test uses a part of it.

use nebd_nbd::negotiate::Refusal;
use nebd_nbd::wire::{self, info, option};
use nebd_nbd::{Export, ExportFlags, Negotiation, Sizes, Step, Terms};

pub fn client_flags(flags: u16) -> Vec<u8> {
    u32::from(flags).to_be_bytes().to_vec()
}

pub fn fixed() -> Vec<u8> {
    client_flags(wire::FLAG_FIXED_NEWSTYLE | wire::FLAG_NO_ZEROES)
}

pub fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = wire::OPTION_MAGIC.to_be_bytes().to_vec();
    bytes.extend(number.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

pub fn info(number: u32, name: &str, items: &[u16]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend(name.as_bytes());
    data.extend((items.len() as u16).to_be_bytes());
    data.extend(items.iter().flat_map(|item| item.to_be_bytes()));
    option(number, &data)
}

pub fn go(name: &str) -> Vec<u8> {
    info(option::GO, name, &[info::NAME, info::DESCRIPTION, info::BLOCK_SIZE])
}

pub fn meta(number: u32, name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend(name.as_bytes());
    data.extend((queries.len() as u32).to_be_bytes());
    for query in queries {
        data.extend((query.len() as u32).to_be_bytes());
        data.extend(query.as_bytes());
    }
    option(number, &data)
}

pub fn request(flags: u16, command: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    let mut bytes = wire::REQUEST_MAGIC.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(command.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes
}

/// Everything that an export can offer.
pub fn all_flags() -> ExportFlags {
    [
        ExportFlags::SEND_FLUSH,
        ExportFlags::SEND_FUA,
        ExportFlags::SEND_TRIM,
        ExportFlags::SEND_WRITE_ZEROES,
        ExportFlags::SEND_FAST_ZERO,
        ExportFlags::SEND_CACHE,
        ExportFlags::CAN_MULTI_CONN,
    ]
    .into_iter()
    .fold(ExportFlags::NONE, |all, flag| all | flag)
}

pub fn export(name: &str) -> Export {
    Export {
        name: name.to_owned(),
        description: "a disk".to_owned(),
        size: 1 << 20,
        sizes: Sizes::new(512, 4096, 64 << 10).unwrap(),
        flags: all_flags(),
    }
}

/// What a client with everything agreed on gets.
pub fn terms() -> Terms {
    let Export { size, sizes, flags, .. } = export("disk");
    let flags = flags | ExportFlags::HAS_FLAGS | ExportFlags::SEND_DF;
    Terms { size, sizes, flags, structured: true, allocation: true }
}

/// Answers questions: `disk` is there, `secret` for TLS alone, `busy` not now.
pub fn answered(negotiation: &mut Negotiation, step: Step, out: &mut Vec<u8>) -> Step {
    match step {
        Step::List(question) => {
            let exports = [("disk", "a disk"), ("other", "")];
            negotiation.answer_list(question, exports, out)
        }
        Step::Export(question) => {
            let answer = match question.name() {
                "" | "disk" => Ok(export("disk")),
                "secret" => Err(Refusal::TlsRequired),
                "busy" => Err(Refusal::Policy),
                _ => Err(Refusal::Unknown),
            };
            negotiation.answer_export(question, answer, out)
        }
        step => step,
    }
}

/// Feeds everything, answers everything; the last step and how much was taken.
pub fn feed(negotiation: &mut Negotiation, input: &[u8], out: &mut Vec<u8>) -> (usize, Step) {
    let mut at = 0;
    loop {
        let (taken, step) = negotiation.advance(&input[at..], out);
        at += taken;
        match answered(negotiation, step, out) {
            Step::Sent => {}
            step => return (at, step),
        }
    }
}
