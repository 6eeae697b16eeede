//! A server writes whatever it likes, wherever it likes, between the steps of a client: no slot
//! that holds no request ever completes, and none completes twice.

#![no_main]

use libfuzzer_sys::fuzz_target;
use nebd_abi::ring::{Buffer, ClientReap, ClientSubmit, Submission};
use nebd_abi::{Op, OpFlags};
use nebd_fuzz::{Input, region};

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input(bytes);
    let region = region();
    let memory = region.queue(0).expect("the first");
    let (mut submit, mut reap) = (ClientSubmit::new(memory.clone()), ClientReap::new(memory));
    let buffers = [Buffer { memory: 0, length: 512, offset: 0 }; 4];
    while !input.0.is_empty() {
        match input.byte() % 5 {
            0 | 1 => input.scribble(&region),
            2 => {
                let choice = input.byte();
                let buffers = &buffers[..usize::from(choice >> 4) % 5];
                let length = buffers.len() as u64 * 512;
                let (op, flags) = (Op::Read, OpFlags::NONE);
                let request = Submission { op, flags, offset: 0, length, buffers };
                submit.submit(u32::from(choice % 4), &request);
                let _ = submit.kick_needed();
            }
            _ => {
                // One look at each entry of the ring is all that a reap may take.
                for _ in 0..8 {
                    let Some(completion) = reap.reap() else { break };
                    assert!(completion.slot < 4 && completion.seq != 0);
                }
                let _ = (reap.sleep(), reap.is_ready());
                reap.wake();
            }
        }
    }
});
