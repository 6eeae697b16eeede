//! A client writes whatever it likes, wherever it likes, between the steps of a server.

#![no_main]

use libfuzzer_sys::fuzz_target;
use nebd_abi::ring::{ServerQueue, Submission};
use nebd_abi::{Epoch, Errno, Op, OpFlags};
use nebd_fuzz::{Input, region};

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input(bytes);
    let region = region();
    let memory = region.queue(0).expect("the first");
    let mut honest = nebd_abi::ring::ClientSubmit::new(memory.clone());
    let mut minor = 1;
    let (mut server, mut taken) = ServerQueue::adopt(memory.clone(), Epoch { major: 1, minor });
    while !input.0.is_empty() {
        match input.byte() % 6 {
            0 | 1 => input.scribble(&region),
            2 => {
                let slot = u32::from(input.byte() % 4);
                let (offset, length, buffers) = (u64::from(input.byte()), 512, &[]);
                let (op, flags) = (Op::Discard, OpFlags::NONE);
                honest.submit(slot, &Submission { op, flags, offset, length, buffers });
            }
            3 => {
                if let Ok(Some(request)) = server.pop() {
                    assert!(request.slot < server.depth());
                    assert!(request.buffers.as_slice().len() <= 4);
                    taken.push(request);
                }
            }
            4 => {
                if let Some(request) = taken.pop() {
                    server.publish(request.slot, request.seq, Err(Errno::IO));
                }
                let _ = (server.call_needed(), server.sleep(), server.is_ready());
                server.wake();
            }
            _ => {
                minor += 1;
                (server, taken) = ServerQueue::adopt(memory.clone(), Epoch { major: 1, minor });
                assert!(taken.len() <= server.depth() as usize);
                assert!(taken.iter().all(|request| request.slot < server.depth()));
            }
        }
    }
});
