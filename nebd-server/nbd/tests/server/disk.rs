//! A disk in memory that knows which of its blocks were written.

use std::sync::Mutex;

use nebd_nbd::{Export, ExportFlags, Extent, Request, Sizes, Span};

const BLOCK_BYTES: u64 = 4096;

struct Blocks {
    data: Vec<u8>,
    allocated: Vec<bool>,
}

pub struct Disk {
    pub export: Export,
    /// Where reads fail.
    pub bad: Option<u64>,
    blocks: Mutex<Blocks>,
}

impl Disk {
    pub fn new(name: &str, size: u64) -> Disk {
        let flags = [
            ExportFlags::SEND_FLUSH,
            ExportFlags::SEND_FUA,
            ExportFlags::SEND_TRIM,
            ExportFlags::SEND_WRITE_ZEROES,
            ExportFlags::SEND_FAST_ZERO,
            ExportFlags::SEND_CACHE,
            ExportFlags::CAN_MULTI_CONN,
        ];
        let export = Export {
            name: name.to_owned(),
            description: "in memory".to_owned(),
            size,
            sizes: Sizes::new(512, BLOCK_BYTES as u32, 4 << 20).unwrap(),
            flags: flags.into_iter().fold(ExportFlags::NONE, |all, flag| all | flag),
        };
        let allocated = vec![false; size.div_ceil(BLOCK_BYTES) as usize];
        let blocks = Mutex::new(Blocks { data: vec![0; size as usize], allocated });
        Disk { export, bad: None, blocks }
    }

    pub fn read_only(mut self) -> Disk {
        self.export.flags = self.export.flags | ExportFlags::READ_ONLY;
        self
    }

    pub fn failing_at(mut self, offset: u64) -> Disk {
        self.bad = Some(offset);
        self
    }

    pub fn with_sizes(mut self, sizes: Sizes) -> Disk {
        self.export.sizes = sizes;
        self
    }

    /// `None` if a part of it fails.
    pub fn read(&self, offset: u64, length: u32) -> Option<Vec<u8>> {
        let end = offset + u64::from(length);
        let is_bad = self.bad.is_some_and(|bad| (offset..end).contains(&bad));
        let blocks = self.blocks.lock().unwrap();
        (!is_bad).then(|| blocks.data[offset as usize..end as usize].to_vec())
    }

    pub fn write(&self, offset: u64, payload: &[u8]) {
        let end = offset + payload.len() as u64;
        let mut blocks = self.blocks.lock().unwrap();
        blocks.data[offset as usize..end as usize].copy_from_slice(payload);
        for block in offset / BLOCK_BYTES..end.div_ceil(BLOCK_BYTES) {
            blocks.allocated[block as usize] = true;
        }
    }

    /// Whole blocks of the range become holes.
    pub fn trim(&self, offset: u64, length: u32) {
        let end = offset + u64::from(length);
        let mut blocks = self.blocks.lock().unwrap();
        for block in offset.div_ceil(BLOCK_BYTES)..end / BLOCK_BYTES {
            blocks.allocated[block as usize] = false;
            let at = (block * BLOCK_BYTES) as usize;
            blocks.data[at..at + BLOCK_BYTES as usize].fill(0);
        }
    }

    pub fn zero(&self, offset: u64, length: u32, keep: bool) {
        if keep {
            self.write(offset, &vec![0; length as usize]);
        } else {
            self.trim(offset, length);
            let end = (offset + u64::from(length)) as usize;
            self.blocks.lock().unwrap().data[offset as usize..end].fill(0);
        }
    }

    /// Lengths and whether it is a hole, block by block.
    fn walk(&self, offset: u64, end: u64) -> Vec<(u64, bool)> {
        let blocks = self.blocks.lock().unwrap();
        let mut stretches = Vec::new();
        let mut at = offset;
        while at < end {
            let next = ((at / BLOCK_BYTES + 1) * BLOCK_BYTES).min(end);
            stretches.push((next - at, !blocks.allocated[(at / BLOCK_BYTES) as usize]));
            at = next;
        }
        stretches
    }

    pub fn spans(&self, request: &Request) -> Vec<Span> {
        let stretches = self.walk(request.offset, request.offset + u64::from(request.length));
        let span = |(length, is_hole)| Span { length: length as u32, is_hole };
        stretches.into_iter().map(span).collect()
    }

    /// To the end of the disk: the library cuts it.
    pub fn extents(&self, request: &Request) -> Vec<Extent> {
        let stretches = self.walk(request.offset, self.export.size);
        let extent = |(length, is_hole)| Extent { length, is_hole, is_zero: is_hole };
        stretches.into_iter().map(extent).collect()
    }
}
