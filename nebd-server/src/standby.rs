//! A warm standby: it follows the store, and prepares what a server needs, so that little is left to
//! be done once the owner is dead.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use crossbeam::channel::{Receiver, Sender, bounded};
use nebd_abi::host::HostPage;
use nebd_keeper::inherit::Inherited;
use nebd_keeper::names;
use nebd_keeper::standby::{StandbyChannel, StandbyMessage};

use crate::config::Config;
use crate::run::{Heir, Ingredients, RunError, assemble, system};
use crate::successor::Preparation;

/// Changes of the store come in groups, and need not be followed at once.
const SETTLE: Duration = Duration::from_millis(50);

/// Waits and prepares until this process is wanted; `None` if the keeper has gone.
pub(crate) fn stand_by(
    config: &Config,
    host: Arc<HostPage>,
    mut inherited: Inherited,
    channel: OwnedFd,
) -> Result<Option<Heir>, RunError> {
    let channel = StandbyChannel::new(channel);
    let receive = || channel.recv().map_err(system("hear from the keeper"));
    let mut predecessor = inherited.predecessor.take();
    let is_wanted = loop {
        match receive()? {
            Some(StandbyMessage::Store(name, fd)) if name == names::PREDECESSOR => {
                predecessor = Some(fd);
            }
            Some(StandbyMessage::Store(name, fd)) => _ = inherited.store.insert(name, fd),
            Some(StandbyMessage::Remove(name)) => _ = inherited.store.remove(&name),
            Some(StandbyMessage::Sync) => break false,
            Some(StandbyMessage::Activate) => break true,
            None => return Ok(None),
        }
    };
    let assembly = assemble(config, Ingredients::of(config, host, inherited, None)?)?;
    let preparation = Preparation::new(assembly.server.clone());
    if !is_wanted {
        let store = &assembly.server.store;
        let changed = start_preparing(preparation.clone())?;
        tracing::info!("standing by");
        loop {
            match receive()? {
                Some(StandbyMessage::Store(name, fd)) if name == names::PREDECESSOR => {
                    predecessor = Some(fd);
                    continue;
                }
                Some(StandbyMessage::Store(name, fd)) => {
                    store.adopt(name.clone(), fd);
                    preparation.note_change(&name);
                }
                Some(StandbyMessage::Remove(name)) => {
                    store.disown(&name);
                    preparation.note_change(&name);
                }
                Some(StandbyMessage::Sync) => continue,
                Some(StandbyMessage::Activate) => break,
                None => return Ok(None),
            }
            // Full: it is awake already.
            let _ = changed.try_send(());
        }
    }
    let sessions = preparation.take();
    Ok(Some(Heir { assembly, predecessor, sessions }))
}

/// Prepares on a thread of its own: the order to take over must be heard meanwhile.
fn start_preparing(preparation: Arc<Preparation>) -> Result<Sender<()>, RunError> {
    let (sender, receiver) = bounded(1);
    // What is there already.
    let _ = sender.try_send(());
    let work = move || follow(&receiver, &preparation);
    std::thread::Builder::new()
        .name("nebd-prepare".into())
        .spawn(work)
        .map_err(system("start a thread"))?;
    Ok(sender)
}

fn follow(changes: &Receiver<()>, preparation: &Arc<Preparation>) {
    while changes.recv().is_ok() {
        std::thread::sleep(SETTLE);
        preparation.begin_update();
    }
}
