//! From two looks at a server: how much went on between them.

use std::collections::HashMap;
use std::time::Duration;

use nebd_rpc::admin::{Counters, Status, Volume};

/// What went on in a volume, or in all of them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rates {
    /// Requests a second.
    pub iops: f64,
    /// Bytes read a second.
    pub read_bytes_per_s: f64,
    /// Bytes written a second.
    pub write_bytes_per_s: f64,
    /// Requests a second that were answered with an error.
    pub errors_per_s: f64,
    /// Half of the requests took no longer; none without requests.
    pub latency_p50_us: Option<f64>,
    /// 99 % of the requests took no longer.
    pub latency_p99_us: Option<f64>,
}

/// Totals of one volume, or sums of them.
#[derive(Clone, Debug, Default)]
struct Totals {
    requests: u64,
    errors: u64,
    read: u64,
    written: u64,
    buckets: Vec<u64>,
}

impl Totals {
    fn of(counters: &Counters) -> Totals {
        let bytes = |name| counters.ops.iter().find(|op| op.op == name).map_or(0, |op| op.bytes);
        Totals {
            requests: counters.ops.iter().map(|op| op.requests).sum(),
            errors: counters.ops.iter().map(|op| op.errors).sum(),
            read: bytes("read"),
            written: bytes("write"),
            buckets: counters.latency_buckets.clone(),
        }
    }

    /// What was added since `before`. A volume that was made anew under its name starts from zero:
    /// what it lacks counts as nothing.
    fn since(&self, before: &Totals) -> Totals {
        let bucket = |(index, count): (usize, &u64)| {
            count.saturating_sub(before.buckets.get(index).copied().unwrap_or(0))
        };
        Totals {
            requests: self.requests.saturating_sub(before.requests),
            errors: self.errors.saturating_sub(before.errors),
            read: self.read.saturating_sub(before.read),
            written: self.written.saturating_sub(before.written),
            buckets: self.buckets.iter().enumerate().map(bucket).collect(),
        }
    }

    fn add(&mut self, other: &Totals) {
        self.requests += other.requests;
        self.errors += other.errors;
        self.read += other.read;
        self.written += other.written;
        let length = self.buckets.len().max(other.buckets.len());
        self.buckets.resize(length, 0);
        for (mine, theirs) in self.buckets.iter_mut().zip(&other.buckets) {
            *mine += theirs;
        }
    }

    fn rates(&self, interval: Duration) -> Rates {
        let seconds = interval.as_secs_f64().max(1e-6);
        Rates {
            iops: self.requests as f64 / seconds,
            read_bytes_per_s: self.read as f64 / seconds,
            write_bytes_per_s: self.written as f64 / seconds,
            errors_per_s: self.errors as f64 / seconds,
            latency_p50_us: quantile_us(&self.buckets, 0.5),
            latency_p99_us: quantile_us(&self.buckets, 0.99),
        }
    }
}

/// Rates of each volume of `now`, in its order, and of all together. A volume that was not there
/// before has none yet.
pub fn between(before: &Status, now: &Status, interval: Duration) -> (Vec<Rates>, Rates) {
    let totals = |volume: &Volume| volume.counters.as_ref().map(Totals::of);
    let known: HashMap<&str, Totals> =
        before.volumes.iter().filter_map(|v| Some((v.name.as_str(), totals(v)?))).collect();
    let mut all = Totals::default();
    let rates = now.volumes.iter().map(|volume| {
        let added = totals(volume).zip(known.get(volume.name.as_str()));
        let added = added.map(|(now, before)| now.since(before)).unwrap_or_default();
        all.add(&added);
        added.rates(interval)
    });
    let rates = rates.collect();
    (rates, all.rates(interval))
}

/// Where a bucket begins and ends, in microseconds: as `docs/formats.md` draws them.
fn bounds_us(bucket: usize) -> (f64, f64) {
    if bucket < 8 {
        return (bucket as f64, bucket as f64 + 1.0);
    }
    let width = 2f64.powi((bucket / 8 - 1) as i32);
    let start = (8 + bucket % 8) as f64 * width;
    (start, start + width)
}

/// The time that `quantile` (0 to 1) of all do not exceed, by a straight line through its bucket.
fn quantile_us(buckets: &[u64], quantile: f64) -> Option<f64> {
    let total: u64 = buckets.iter().sum();
    let wanted = quantile * total as f64;
    let mut seen = 0;
    for (bucket, count) in buckets.iter().enumerate().filter(|(_, count)| **count > 0) {
        if (seen + count) as f64 >= wanted {
            let (start, end) = bounds_us(bucket);
            let share = (wanted - seen as f64) / *count as f64;
            return Some(start + (end - start) * share.clamp(0.0, 1.0));
        }
        seen += count;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use nebd_rpc::admin::OpCounters;

    fn status(volumes: &[(&str, u64, u64, &[u64])]) -> Status {
        let volume = |(name, reads, errors, buckets): &(&str, u64, u64, &[u64])| Volume {
            name: (*name).into(),
            counters: Some(Counters {
                ops: vec![OpCounters {
                    op: "read".into(),
                    requests: *reads,
                    errors: *errors,
                    bytes: reads * 4096,
                }],
                latency_buckets: buckets.to_vec(),
                ..Counters::default()
            }),
            ..Volume::default()
        };
        Status { volumes: volumes.iter().map(volume).collect(), ..Status::default() }
    }

    #[test]
    fn rates_are_differences_over_time_and_never_negative() {
        let before = status(&[("a", 1000, 2, &[0, 5]), ("made-anew", 1 << 40, 0, &[9, 9, 9])]);
        let now = status(&[
            ("a", 3000, 4, &[0, 5, 0, 2000]),
            ("made-anew", 10, 0, &[1]),
            ("new", 7, 0, &[7]),
        ]);
        let (rates, all) = between(&before, &now, Duration::from_secs(2));
        assert_eq!((rates[0].iops, rates[0].errors_per_s), (1000.0, 1.0));
        assert_eq!(rates[0].read_bytes_per_s, 4_096_000.0);
        assert_eq!((rates[0].latency_p50_us, rates[0].latency_p99_us), (Some(3.5), Some(3.99)));
        assert_eq!((&rates[1], &rates[2]), (&Rates::default(), &Rates::default()));
        assert_eq!(all, rates[0]);
    }

    #[test]
    fn buckets_follow_each_other_without_a_gap() {
        for bucket in 0..207 {
            assert_eq!(bounds_us(bucket).1, bounds_us(bucket + 1).0, "{bucket}");
        }
        assert_eq!(bounds_us(207).1, f64::from(1 << 28));
        assert_eq!(quantile_us(&[], 0.5), None);
        assert_eq!(quantile_us(&[0, 0], 0.5), None);
    }
}
