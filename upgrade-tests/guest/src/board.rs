//! The board: what the host and a guest tell each other.
//!
//! ```text
//!  0        64 words a disk    512 KiB                   1 MiB      a MiB a disk
//!  ├ common ┼ disks ───────────┼ longest gap by epoch ───┼ entries: acknowledged, begun ──┤
//! ```
//!
//! A file of the host's, which the guest sees as the memory of a PCI device and the host reads and
//! writes as a file. It outlives resets of the guest and deaths of QEMU; so the guest that comes after knows
//! what the one before had been told. Words of 8 bytes, each written by one side only.

/// Bytes of the board.
pub const BYTES: u64 = 8 << 20;
/// Disks that there is room for.
pub const DISKS_MAX: usize = 4;
/// Epochs that there is room for.
pub const EPOCHS_MAX: u64 = 8192;
/// Entries of a disk that there is room for: blocks, or files.
pub const ENTRIES_MAX: usize = 1 << 16;
/// Bytes of a block.
pub const BLOCK_BYTES: usize = 4096;
/// What the host writes into [`Common::Magic`] when all else of its is written.
pub const MAGIC: u64 = u64::from_le_bytes(*b"NEBDGST1");

const DISKS_AT: usize = 64;
const DISK_WORDS: usize = 64;
const GAPS_AT: usize = (512 << 10) / 8;
const ENTRIES_AT: usize = (1 << 20) / 8;

/// Words that are there once.
#[derive(Clone, Copy, Debug)]
#[repr(usize)]
pub enum Common {
    /// Host: [`MAGIC`].
    Magic = 0,
    /// Host: a number that grows, shifted by 8, and a [`Command`].
    Command = 1,
    /// Host: to which time the gaps belong that end now.
    Epoch = 2,
    /// Host: how many disks there are.
    Disks = 3,
    /// Guest: a [`State`].
    State = 16,
    /// Guest: how often it has booted.
    Boots = 17,
    /// Guest: the last command that it has carried out.
    Answered = 18,
    /// Guest: grows while the guest runs.
    Beat = 19,
}

/// Words of a disk.
#[derive(Clone, Copy, Debug)]
#[repr(usize)]
pub enum OfDisk {
    /// Host: a [`Kind`].
    Kind = 0,
    /// Host: its size in bytes.
    Bytes = 1,
    /// Host: how many requests are kept in flight, each by a thread.
    Depth = 2,
    /// Host: milliseconds that a thread rests after a request.
    Rest = 3,
    /// Guest: 1 once the file system has been made.
    Made = 16,
    /// Guest: requests answered, since the first boot; of file systems, files written or read.
    Requests = 17,
    /// Guest: of these, with an error.
    Errors = 18,
    /// Guest: blocks, or files, that held what they must not.
    Mismatches = 19,
    /// Guest: blocks, or files, that were compared.
    Checked = 20,
    /// Guest: requests in flight.
    InFlight = 21,
    /// Guest: the check of the file system at the end: 1 for clean, 2 for not.
    Fsck = 22,
    /// Guest: longest gap since the first boot, in microseconds.
    GapMax = 23,
    /// Guest: virtqueues that it uses.
    Queues = 24,
    /// Guest: 1 if these are packed, 2 if not.
    Packed = 25,
}

macro_rules! numbered {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $value:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u64)]
        pub enum $name { $($(#[$variant_doc])* $variant = $value),+ }

        impl $name {
            /// What this number stands for.
            pub fn from_word(word: u64) -> Option<$name> {
                match word { $($value => Some($name::$variant),)+ _ => None }
            }
        }
    };
}

numbered! {
    /// What the host wants.
    Command {
        /// End the load, compare everything, unmount and check file systems; then rest.
        Rest = 1,
        /// Switch off.
        PowerOff = 2,
        /// End the load, unmount, and boot again.
        Reboot = 3,
    }
}

numbered! {
    /// What the guest does.
    State {
        /// Its program does not run, or not yet; the host writes this when it resets the guest.
        Absent = 0,
        /// Makes and mounts file systems, compares what an earlier boot left.
        Prepares = 1,
        /// Keeps requests in flight.
        Works = 2,
        /// Was told to rest, and compares everything.
        Compares = 3,
        /// Has compared everything.
        Rests = 4,
    }
}

numbered! {
    /// What is on a disk.
    Kind {
        /// Stamps.
        Raw = 0,
        /// ext4, with files of stamps.
        Ext4 = 1,
        /// XFS, with files of stamps.
        Xfs = 2,
    }
}

/// Words that another may change.
pub trait Words {
    /// Word number `word`.
    fn load(&self, word: usize) -> u64;
    /// Changes a word that is ours.
    fn store(&self, word: usize, value: u64);
}

/// The board, seen from one side.
#[derive(Clone, Copy, Debug)]
pub struct Board<W>(pub W);

impl<W: Words> Board<W> {
    /// A word that is there once.
    pub fn get(&self, field: Common) -> u64 {
        self.0.load(field as usize)
    }

    /// Changes one.
    pub fn set(&self, field: Common, value: u64) {
        self.0.store(field as usize, value);
    }

    /// A word of a disk.
    pub fn of_disk(&self, disk: usize, field: OfDisk) -> u64 {
        self.0.load(disk_word(disk, field))
    }

    /// Changes one.
    pub fn set_of_disk(&self, disk: usize, field: OfDisk, value: u64) {
        self.0.store(disk_word(disk, field), value);
    }

    /// The longest gap of a disk that ended in this epoch, in microseconds.
    pub fn gap(&self, disk: usize, epoch: u64) -> u64 {
        self.0.load(gap_word(disk, epoch))
    }

    /// Changes it.
    pub fn set_gap(&self, disk: usize, epoch: u64, us: u64) {
        self.0.store(gap_word(disk, epoch), us);
    }

    /// What a block or file holds.
    pub fn entry(&self, disk: usize, index: usize) -> Entry {
        let word = entry_word(disk, index);
        Entry { acknowledged: Value(self.0.load(word)), begun: Value(self.0.load(word + 1)) }
    }

    /// A change of a block or file is about to begin.
    pub fn begin(&self, disk: usize, index: usize, value: Value) {
        self.0.store(entry_word(disk, index) + 1, value.0);
    }

    /// It is known what a block or file holds.
    pub fn acknowledge(&self, disk: usize, index: usize, value: Value) {
        let word = entry_word(disk, index);
        self.0.store(word, value.0);
        self.0.store(word + 1, value.0);
    }
}

fn disk_word(disk: usize, field: OfDisk) -> usize {
    DISKS_AT + disk * DISK_WORDS + field as usize
}

fn gap_word(disk: usize, epoch: u64) -> usize {
    GAPS_AT + disk * EPOCHS_MAX as usize + (epoch % EPOCHS_MAX) as usize
}

fn entry_word(disk: usize, index: usize) -> usize {
    ENTRIES_AT + 2 * (disk * ENTRIES_MAX + index)
}

/// What was written: a number that no other
/// write to this disk has, from 1, and whether it was nothing at all (zeros, or the
/// absence of a file). What was never written is nothing, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Value(u64);

impl Value {
    /// Write number `number`, from 1.
    pub fn new(number: u64, is_nothing: bool) -> Value {
        Value(number << 1 | u64::from(is_nothing))
    }

    /// The number of the write.
    pub fn number(self) -> u64 {
        self.0 >> 1
    }

    /// Whether there is nothing.
    pub fn is_nothing(self) -> bool {
        self.0 == 0 || self.0 & 1 == 1
    }

    /// Whether a block or file that holds this (`None`: nothing) may be what is meant.
    pub fn is(self, found: Option<u64>) -> bool {
        match found {
            None => self.is_nothing(),
            Some(number) => !self.is_nothing() && number == self.number(),
        }
    }
}

/// What a block or file may hold: what was acknowledged last, or what was begun since.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Acknowledged.
    pub acknowledged: Value,
    /// Begun; the same, if its end is known.
    pub begun: Value,
}

impl Entry {
    /// Whether the end of the last change is unknown.
    pub fn is_in_doubt(self) -> bool {
        self.acknowledged != self.begun
    }

    /// Which of the two this is, if it is one.
    pub fn settle(self, found: Option<u64>) -> Option<Value> {
        [self.acknowledged, self.begun].into_iter().find(|value| value.is(found))
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    struct Memory(RefCell<Vec<u64>>);

    impl Words for Memory {
        fn load(&self, word: usize) -> u64 {
            self.0.borrow()[word]
        }

        fn store(&self, word: usize, value: u64) {
            self.0.borrow_mut()[word] = value;
        }
    }

    #[test]
    fn a_change_whose_end_is_unknown_leaves_the_old_or_the_new() {
        let board = Board(Memory(RefCell::new(vec![0; BYTES as usize / 8])));
        let at = |found| board.entry(1, 7).settle(found);
        assert!(at(None).is_some() && at(Some(1)).is_none());
        let first = Value::new(1, false);
        board.begin(1, 7, first);
        assert!(board.entry(1, 7).is_in_doubt());
        assert!(at(None).is_some() && at(Some(1)) == Some(first) && at(Some(2)).is_none());
        board.acknowledge(1, 7, first);
        assert!(at(None).is_none() && at(Some(1)).is_some());
        board.begin(1, 7, Value::new(2, true));
        assert!(at(None).is_some() && at(Some(1)).is_some() && at(Some(2)).is_none());
        assert_eq!(board.entry(0, 7).begun, Value(0), "another disk's");
    }

    #[test]
    fn everything_has_its_own_place() {
        let last_of = |disk| entry_word(disk, ENTRIES_MAX - 1) + 1;
        assert!((last_of(DISKS_MAX - 1) as u64) < BYTES / 8);
        assert_eq!(last_of(0) + 1, entry_word(1, 0));
        assert!(gap_word(DISKS_MAX - 1, EPOCHS_MAX - 1) < ENTRIES_AT);
        assert!(disk_word(DISKS_MAX - 1, OfDisk::Packed) < GAPS_AT);
        assert_eq!(Command::from_word(2), Some(Command::PowerOff));
        assert_eq!(State::from_word(9), None);
    }
}
