use std::path::Path;

use super::*;

#[path = "../../../../proto/abi/tests/golden/text.rs"]
mod text;

fn kept() -> Kept {
    let region = RegionSpec {
        guest_address: 0x1111_2222_3333_4444,
        size: 0x5555_6666,
        user_address: 0x7f00_0000_1000,
        mmap_offset: 0x2000,
    };
    let mut kept = Kept::new(2);
    (0..9).for_each(|_| _ = kept.next_serial());
    kept.record = KeptRecord { serial: 4, queues: 2, queue_size: 128, offset: 64 };
    kept.channel = 5;
    kept.regions = vec![(region, 6)];
    kept.rings[1] = KeptRing { kick: 7, call: 9 };
    kept
}

#[test]
fn golden_bytes() {
    #[rustfmt::skip]
    let fields = [
        (4, "version"), (4, "last serial"), (4, "regions"), (4, "rings"),
        (4, "record serial"), (2, "record queues"), (2, "record entries"), (8, "record offset"),
        (8, "channel serial"),
        (8, "region guest_address"), (8, "region size"), (8, "region user_address"),
        (8, "region mmap_offset"), (8, "region serial"),
        (8, "ring 0"), (4, "ring 1 kick"), (4, "ring 1 call"), (0, "state"),
    ];
    let bytes = kept().encode(b"state!");
    assert_eq!(bytes.len(), HEADER_BYTES + REGION_BYTES + 2 * RING_BYTES + 6);
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v1");
    let text = text::render("What is kept of a hypervisor's descriptors", &bytes, &fields);
    let stored = text::golden(&folder, "vhost_kept", &text);
    assert_eq!(Kept::decode(&stored, 2), Some((kept(), &b"state!"[..])));
}

#[test]
fn what_is_written_is_read_and_nothing_else_is() {
    let kept = kept();
    let bytes = kept.encode(b"state!");
    assert_eq!(Kept::decode(&bytes, 2), Some((kept.clone(), &b"state!"[..])));
    assert_eq!(Kept::decode(&bytes, 3), None);
    for length in 1..bytes.len() - 6 {
        assert_eq!(Kept::decode(&bytes[..length], 2), None, "{length} bytes");
    }
    let mut huge = bytes.clone();
    huge[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
    assert_eq!(Kept::decode(&huge, 2), None);
    assert_eq!(Kept::decode(&[], 2), Some((Kept::new(2), &[][..])));
    let named: Vec<Serial> = (1..=9).filter(|serial| kept.names(*serial)).collect();
    assert_eq!(named, [4, 5, 6, 7, 9]);
}
