//! What happens to a guest, in which order.

use super::fault::Fault;
use crate::stamp::Dice;

/// Ways for a server to die, taken in turn.
const KILLS: [Fault; 8] = [
    Fault::Kill,
    Fault::KillAndDown,
    Fault::Crash,
    Fault::Stop,
    Fault::Kill,
    Fault::Kill,
    Fault::Kill,
    Fault::Kill,
];
/// What befalls the guest itself.
const OF_GUEST: [Fault; 4] = [Fault::Reset, Fault::Pause, Fault::QemuKill, Fault::Reboot];

/// So many kills and planned takeovers, and what belongs to them: takeovers that fail, moments in which
/// nothing happens, and each thing that befalls the guest itself once for every hundred.
pub fn plan(kills: usize, takeovers: usize, seed: u64) -> Vec<Fault> {
    let rounds = ((kills + takeovers) / 100).max(1);
    let of_guest = OF_GUEST.into_iter().cycle().take(OF_GUEST.len() * rounds);
    let mut faults: Vec<Fault> = KILLS.into_iter().cycle().take(kills).chain(of_guest).collect();
    let carried_out = faults.iter().filter(|fault| fault.is_takeover()).count();
    let mut add = |fault, count| faults.extend(std::iter::repeat_n(fault, count));
    add(Fault::Takeover, takeovers.saturating_sub(carried_out));
    add(Fault::FailedTakeover, takeovers.div_ceil(4));
    add(Fault::StopInTakeover, takeovers.div_ceil(25));
    add(Fault::Nothing, kills.div_ceil(4));
    shuffle(&mut faults, &mut Dice::new(seed));
    faults
}

fn shuffle(faults: &mut [Fault], dice: &mut Dice) {
    for last in (1..faults.len()).rev() {
        faults.swap(last, dice.below(last as u64 + 1) as usize);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(faults: &[Fault], is_one: impl Fn(Fault) -> bool) -> usize {
        faults.iter().filter(|fault| is_one(**fault)).count()
    }

    #[test]
    fn as_many_as_asked_for_and_all_kinds() {
        let long = plan(200, 200, 1);
        assert_eq!(count(&long, Fault::is_kill), 200);
        assert_eq!(count(&long, Fault::is_takeover), 200);
        for fault in Fault::ALL {
            assert!(long.contains(&fault), "{fault}");
        }
        let short = plan(4, 4, 1);
        assert_eq!((count(&short, Fault::is_kill), count(&short, Fault::is_takeover)), (4, 4));
        for fault in Fault::ALL {
            assert!(short.contains(&fault), "{fault}");
        }
        assert_ne!(plan(4, 4, 1), plan(4, 4, 2));
    }
}
