//! Which values a block may have.
//!
//! ```text
//!   begin(write 7) ─► {5, 7}      a read that overlaps the write may see either
//!   end: Done      ─► {7}         5 is stale from here on
//!   end: Failed    ─► {5, 7}      old or new, for good (until the next write)
//!   discard: Done  ─► {5, zeros}  "may be forgotten"
//!   power cut      ─► {what was durable, and everything written since}
//! ```
//!
//! Each block keeps a short history of what was written to it. An entry that *supersedes* (a write
//! or write-zeroes that was acknowledged) ends the life of those before it; a failed write or a
//! discard only adds a possibility. Readers hold the history back: a read is judged by what was
//! allowed at any moment between its submission and its completion.

/// What a block holds: zeros, or what write number n left there.
pub type Value = u64;

/// The value of a block that was never written, or was zeroed.
pub const ZEROS: Value = 0;

/// Whatever an earlier user of the volume left there: any contents pass.
pub const ANYTHING: Value = Value::MAX;

/// A moment: nanoseconds since the run began, strictly increasing. Zero is before everything.
pub type Moment = u64;

const NEVER: Moment = Moment::MAX;

/// How a request that changes blocks ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Acknowledged; the block has the value.
    Done,
    /// Acknowledged with FUA: it is durable, too.
    Durable,
    /// Acknowledged, but the block may have kept its old value (a discard).
    Maybe,
    /// It failed: old or new.
    Failed,
}

/// One value that a block has or had.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// The value.
    pub value: Value,
    /// When its request was submitted.
    pub begun: Moment,
    /// When its request was answered; `None` while it is in flight.
    pub ended: Option<Moment>,
    /// When a later write was acknowledged over it; `Moment::MAX` if none was.
    pub superseded: Moment,
    /// Whether it took the place of what was there before, once it ended.
    supersedes: bool,
}

#[derive(Clone, Debug, Default)]
struct Block {
    /// Empty: zeros since ever.
    entries: Vec<Entry>,
    readers: u32,
    changing: bool,
}

const ZEROS_SINCE_EVER: Entry =
    Entry { value: ZEROS, begun: 0, ended: Some(0), superseded: NEVER, supersedes: true };

/// What every block of one volume may hold.
#[derive(Clone, Debug)]
pub struct Oracle {
    blocks: Vec<Block>,
    /// Whether unflushed history is kept, so that a power cut can be judged.
    tracks_durability: bool,
    /// With `tracks_durability`: blocks with history that a flush may cut.
    unflushed: Vec<u64>,
}

impl Oracle {
    /// For a volume of zeros.
    pub fn new(block_count: u64, tracks_durability: bool) -> Oracle {
        let blocks = vec![Block::default(); block_count as usize];
        Oracle { blocks, tracks_durability, unflushed: Vec::new() }
    }

    /// For a volume whose contents are not known: any block may hold anything, until it is written.
    pub fn of_unknown(block_count: u64, tracks_durability: bool) -> Oracle {
        let mut oracle = Oracle::new(block_count, tracks_durability);
        for block in &mut oracle.blocks {
            block.entries.push(Entry { value: ANYTHING, ..ZEROS_SINCE_EVER });
        }
        oracle
    }

    /// Blocks in the volume.
    pub fn block_count(&self) -> u64 {
        self.blocks.len() as u64
    }

    /// Whether a request that changes this block is in flight.
    pub fn is_changing(&self, block: u64) -> bool {
        self.blocks[block as usize].changing
    }

    /// A request that will leave `value` in `block` is submitted.
    pub fn begin_change(&mut self, block: u64, value: Value, now: Moment) {
        let entry = Entry { value, begun: now, ended: None, superseded: NEVER, supersedes: false };
        let state = &mut self.blocks[block as usize];
        assert!(!state.changing, "two changes of block {block} at once: the outcome is undefined");
        state.changing = true;
        if state.entries.is_empty() {
            state.entries.push(ZEROS_SINCE_EVER);
        }
        state.entries.push(entry);
        if self.tracks_durability {
            self.unflushed.push(block);
        }
    }

    /// The request begun last on this block has ended.
    pub fn end_change(&mut self, block: u64, outcome: Outcome, now: Moment) {
        let keeps_history = self.tracks_durability && outcome != Outcome::Durable;
        let state = &mut self.blocks[block as usize];
        state.changing = false;
        let Some((last, earlier)) = state.entries.split_last_mut() else { return };
        last.ended = Some(now);
        last.supersedes = matches!(outcome, Outcome::Done | Outcome::Durable);
        if last.supersedes {
            for entry in earlier.iter_mut().filter(|entry| entry.superseded == NEVER) {
                entry.superseded = now;
            }
        } else if earlier.iter().any(|e| e.value == last.value && e.superseded == NEVER) {
            // Nothing new is possible; a block that is discarded over and over stays small.
            state.entries.pop();
        }
        if !keeps_history {
            state.prune();
        }
    }

    /// A read of `block` is submitted.
    pub fn begin_read(&mut self, block: u64) {
        self.blocks[block as usize].readers += 1;
    }

    /// Whether a read that was submitted at `since` and is complete now may have seen `value`
    /// (`None`: something that this workload did not write there).
    pub fn allows(&self, block: u64, value: Option<Value>, since: Moment) -> bool {
        let entries = &self.blocks[block as usize].entries;
        if entries.is_empty() {
            return value == Some(ZEROS);
        }
        let matches = |entry: &Entry| entry.value == ANYTHING || Some(entry.value) == value;
        entries.iter().any(|entry| entry.superseded > since && matches(entry))
    }

    /// Everything that such a read may have seen.
    pub fn allowed(&self, block: u64, since: Moment) -> Vec<Entry> {
        let entries = &self.blocks[block as usize].entries;
        if entries.is_empty() {
            return vec![ZEROS_SINCE_EVER];
        }
        entries.iter().filter(|entry| entry.superseded > since).copied().collect()
    }

    /// Whether a change overlapped a read that was submitted at `since` and is complete now.
    pub fn was_contested(&self, block: u64, since: Moment) -> bool {
        let overlaps = |entry: &Entry| entry.ended.is_none_or(|ended| ended > since);
        self.blocks[block as usize].entries.iter().any(overlaps)
    }

    /// The read is judged.
    pub fn end_read(&mut self, block: u64) {
        let keeps_history = self.tracks_durability;
        let state = &mut self.blocks[block as usize];
        state.readers -= 1;
        if !keeps_history {
            state.prune();
        }
    }

    /// A flush that was submitted at `since` was acknowledged: what had ended by then is durable.
    pub fn flushed(&mut self, since: Moment) {
        let mut unflushed = std::mem::take(&mut self.unflushed);
        unflushed.sort_unstable();
        unflushed.dedup();
        unflushed.retain(|block| !self.blocks[*block as usize].make_durable(since));
        self.unflushed = unflushed;
    }

    /// The values that `block` may have after a power cut now: what was durable, and whatever was
    /// written since, acknowledged or not.
    pub fn after_power_cut(&self, block: u64) -> Vec<Value> {
        let entries = &self.blocks[block as usize].entries;
        if entries.is_empty() {
            return vec![ZEROS];
        }
        entries.iter().map(|entry| entry.value).collect()
    }

    /// The power was cut, with nothing in flight: every block has one of
    /// [`after_power_cut`](Self::after_power_cut), and which one is found out by reading.
    pub fn cut_power(&mut self) {
        for block in &mut self.blocks {
            for entry in &mut block.entries {
                entry.superseded = NEVER;
                entry.supersedes = false;
            }
        }
    }

    /// A read after the power cut found this value throughout the block: so it stays.
    pub fn settle(&mut self, block: u64, value: Value, now: Moment) {
        let state = &mut self.blocks[block as usize];
        if state.readers <= 1 && !state.changing {
            state.entries = vec![Entry {
                value,
                begun: 0,
                ended: Some(now),
                superseded: NEVER,
                supersedes: true,
            }];
        }
    }
}

impl Block {
    /// Forgets what nobody may see any more.
    fn prune(&mut self) {
        if self.readers == 0 {
            self.entries.retain(|entry| entry.superseded == NEVER);
        }
    }

    /// Cuts the history before the last value that was acknowledged by `since`; true if nothing
    /// is left that a later flush could cut.
    fn make_durable(&mut self, since: Moment) -> bool {
        if self.readers > 0 {
            return false;
        }
        let last = self
            .entries
            .iter()
            .rposition(|entry| entry.supersedes && entry.ended.is_some_and(|ended| ended <= since));
        if let Some(last) = last {
            self.entries.drain(..last);
        }
        self.entries.len() <= 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(oracle: &Oracle, block: u64, since: Moment) -> Vec<Value> {
        oracle.allowed(block, since).iter().map(|entry| entry.value).collect()
    }

    #[test]
    fn an_acknowledged_write_ends_the_old_value_and_a_failed_one_does_not() {
        let mut oracle = Oracle::new(4, false);
        assert_eq!(values(&oracle, 1, 0), [ZEROS]);
        oracle.begin_change(1, 5, 10);
        assert_eq!(values(&oracle, 1, 11), [ZEROS, 5]);
        oracle.end_change(1, Outcome::Done, 12);
        assert_eq!(values(&oracle, 1, 12), [5]);
        oracle.begin_change(1, 6, 13);
        oracle.end_change(1, Outcome::Failed, 14);
        assert_eq!(values(&oracle, 1, 15), [5, 6]);
        oracle.begin_change(1, ZEROS, 16);
        oracle.end_change(1, Outcome::Maybe, 17);
        assert_eq!(values(&oracle, 1, 18), [5, 6, ZEROS]);
        oracle.begin_change(1, 7, 19);
        oracle.end_change(1, Outcome::Done, 20);
        assert_eq!(values(&oracle, 1, 21), [7]);
    }

    #[test]
    fn a_read_is_judged_by_what_was_allowed_while_it_ran() {
        let mut oracle = Oracle::new(1, false);
        oracle.begin_change(0, 1, 1);
        oracle.begin_read(0);
        oracle.end_change(0, Outcome::Done, 3);
        oracle.begin_read(0);
        oracle.begin_change(0, 2, 5);
        // Submitted at 2: zeros, 1 and 2. Submitted at 4, after the acknowledgement: 1 and 2.
        assert!(
            oracle.allows(0, Some(ZEROS), 2)
                && oracle.allows(0, Some(1), 2)
                && oracle.allows(0, Some(2), 2)
        );
        assert!(!oracle.allows(0, Some(ZEROS), 4) && oracle.allows(0, Some(1), 4));
        assert!(oracle.was_contested(0, 4) && oracle.was_contested(0, 2));
        oracle.end_read(0);
        oracle.end_read(0);
        assert_eq!(values(&oracle, 0, 6), [1, 2]);
        oracle.end_change(0, Outcome::Done, 7);
        assert!(oracle.was_contested(0, 6) && !oracle.was_contested(0, 7));
    }

    #[test]
    fn a_power_cut_takes_back_what_was_not_flushed() {
        let mut oracle = Oracle::new(1, true);
        for (value, outcome) in [(1, Outcome::Done), (2, Outcome::Done)] {
            oracle.begin_change(0, value, value * 10);
            oracle.end_change(0, outcome, value * 10 + 1);
        }
        assert_eq!(oracle.after_power_cut(0), [ZEROS, 1, 2]);
        // Submitted between the two acknowledgements.
        oracle.flushed(15);
        assert_eq!(oracle.after_power_cut(0), [1, 2]);
        oracle.begin_change(0, 3, 30);
        oracle.end_change(0, Outcome::Durable, 31);
        assert_eq!(oracle.after_power_cut(0), [3]);
        oracle.begin_change(0, 4, 40);
        oracle.end_change(0, Outcome::Done, 41);
        assert!(!oracle.allows(0, Some(3), 42));
        oracle.cut_power();
        assert!(oracle.allows(0, Some(3), 42) && oracle.allows(0, Some(4), 42));
        oracle.settle(0, 3, 50);
        assert_eq!(oracle.after_power_cut(0), [3]);
    }
}
