//! Counts of latencies: log-linear buckets, 128 to each power of two, so off by less than 1 %.

const SUB_BITS: u32 = 7;
const SUB: u64 = 1 << SUB_BITS;
/// Longer than this (18 minutes in nanoseconds) counts as this.
const VALUE_BITS_MAX: u32 = 40;

/// A histogram of nanoseconds.
#[derive(Clone, Debug)]
pub struct Histogram {
    counts: Vec<u64>,
    total: u64,
    max: u64,
}

impl Histogram {
    /// An empty one.
    pub fn new() -> Histogram {
        let buckets = (VALUE_BITS_MAX - SUB_BITS + 1) as usize * SUB as usize;
        Histogram { counts: vec![0; buckets], total: 0, max: 0 }
    }

    /// Counts a value.
    pub fn record(&mut self, ns: u64) {
        let bucket = bucket(ns).min(self.counts.len() - 1);
        self.counts[bucket] += 1;
        self.total += 1;
        self.max = self.max.max(ns);
    }

    /// Adds another histogram's counts.
    pub fn add(&mut self, other: &Histogram) {
        for (mine, theirs) in self.counts.iter_mut().zip(&other.counts) {
            *mine += theirs;
        }
        self.total += other.total;
        self.max = self.max.max(other.max);
    }

    /// The largest value.
    pub fn max(&self) -> u64 {
        self.max
    }

    /// The value that `quantile` (0 to 1) of all values do not exceed; 0 if there are none.
    pub fn quantile(&self, quantile: f64) -> u64 {
        let wanted = ((quantile * self.total as f64).ceil() as u64).clamp(1, self.total.max(1));
        let mut seen = 0;
        for (bucket, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= wanted {
                return upper(bucket as u64).min(self.max);
            }
        }
        self.max
    }
}

/// Values below 128 have a bucket each; above, the power of two and the next seven bits choose.
fn bucket(value: u64) -> usize {
    if value < SUB {
        return value as usize;
    }
    let shift = value.ilog2() - SUB_BITS;
    ((u64::from(shift) + 1) * SUB + ((value >> shift) - SUB)) as usize
}

/// The largest value of a bucket.
fn upper(bucket: u64) -> u64 {
    if bucket < SUB {
        return bucket;
    }
    let (shift, sub) = (bucket / SUB - 1, bucket % SUB);
    ((sub + SUB + 1) << shift) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_value_is_in_its_bucket_and_the_error_is_small() {
        let mut value = 0u64;
        while value < 1 << 39 {
            let top = upper(bucket(value) as u64);
            assert!(top >= value && top - value <= value / 100, "{value} {top}");
            assert!(bucket(value + 1) >= bucket(value));
            value += 1 + value / 37;
        }
    }

    #[test]
    fn quantiles_are_those_of_the_values() {
        let mut histogram = Histogram::new();
        assert_eq!(histogram.quantile(0.99), 0);
        for value in 1..=1000 {
            histogram.record(value * 1000);
        }
        let near = |found: u64, wanted: u64| found.abs_diff(wanted) <= wanted / 100;
        assert!(near(histogram.quantile(0.5), 500_000));
        assert!(near(histogram.quantile(0.99), 990_000));
        assert_eq!(histogram.quantile(1.0), 1_000_000);
        histogram.record(u64::MAX);
        assert_eq!(histogram.max(), u64::MAX);
    }
}
