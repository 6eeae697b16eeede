// SPDX-License-Identifier: Apache-2.0
//! Drives a vhost-user-blk server without a guest: random or sequential reads or writes at a fixed
//! depth through one queue. Prints one line of JSON.
//!
//! ```text
//! vhost-blk-bench SOCKET randread|randwrite|read|write BLOCK_BYTES DEPTH SECONDS VOLUME_BYTES
//! ```

use std::mem::MaybeUninit;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use blkio::{Blkio, Blkioq, Completion, MemoryRegion, ReqFlags};

struct Load {
    is_write: bool,
    is_random: bool,
    block_bytes: usize,
    blocks: u64,
    /// Of a xorshift generator; of a sequential load, the next block.
    state: u64,
}

impl Load {
    fn next_offset(&mut self) -> u64 {
        let block = if self.is_random {
            self.state ^= self.state << 13;
            self.state ^= self.state >> 7;
            self.state ^= self.state << 17;
            self.state
        } else {
            self.state += 1;
            self.state
        };
        block % self.blocks * self.block_bytes as u64
    }

    fn submit(&mut self, queue: &mut Blkioq, memory: &MemoryRegion, slot: usize) {
        let offset = self.next_offset();
        let buffer = (memory.addr + slot * self.block_bytes) as *mut u8;
        if self.is_write {
            queue.write(offset, buffer, self.block_bytes, slot, ReqFlags::empty());
        } else {
            queue.read(offset, buffer, self.block_bytes, slot, ReqFlags::empty());
        }
    }
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [socket, op, block_bytes, depth, seconds, volume_bytes] = &arguments[..] else {
        bail!("usage: vhost-blk-bench SOCKET OP BLOCK_BYTES DEPTH SECONDS VOLUME_BYTES");
    };
    let (block_bytes, depth): (usize, usize) = (block_bytes.parse()?, depth.parse()?);
    let mut load = Load {
        is_write: op.ends_with("write"),
        is_random: op.starts_with("rand"),
        block_bytes,
        blocks: volume_bytes.parse::<u64>()? / block_bytes as u64,
        state: 0x9e37_79b9_7f4a_7c15,
    };
    let mut device = Blkio::new("virtio-blk-vhost-user")?;
    device.set_str("path", socket)?;
    device.connect().context("cannot connect")?;
    let mut queue = device.start()?.queues.into_iter().next().context("it has no queue")?;
    let memory = device.alloc_mem_region(block_bytes * depth)?;
    device.map_mem_region(&memory)?;

    let mut since = vec![Instant::now(); depth];
    let mut latencies_ns = Vec::with_capacity(1 << 24);
    let mut completions: Vec<MaybeUninit<Completion>> =
        (0..depth).map(|_| MaybeUninit::uninit()).collect();
    for slot in 0..depth {
        load.submit(&mut queue, &memory, slot);
    }
    let start = Instant::now();
    let end = start + Duration::from_secs_f64(seconds.parse()?);
    let mut in_flight = depth;
    while in_flight > 0 {
        let count = queue.do_io(&mut completions, 1, None, None)?;
        let now = Instant::now();
        for completion in &completions[..count] {
            // SAFETY: do_io has written the first `count`.
            let completion = unsafe { completion.assume_init_ref() };
            if completion.ret != 0 {
                bail!("a request failed: {}", completion.ret);
            }
            let slot = completion.user_data;
            in_flight -= 1;
            if now < end {
                latencies_ns.push(now.duration_since(since[slot]).as_nanos() as u64);
                since[slot] = now;
                load.submit(&mut queue, &memory, slot);
                in_flight += 1;
            }
        }
    }
    latencies_ns.sort_unstable();
    let requests = latencies_ns.len();
    if requests == 0 {
        bail!("no request was answered in time");
    }
    let at = |share: f64| latencies_ns[((requests - 1) as f64 * share) as usize] as f64 / 1e3;
    let iops = requests as f64 / (end - start).as_secs_f64();
    println!(
        r#"{{"requests":{requests},"iops":{iops:.0},"latency_us":{{"p50":{:.1},"p99":{:.1}}}}}"#,
        at(0.5),
        at(0.99)
    );
    Ok(())
}
