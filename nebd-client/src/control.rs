//! The `nebd-control` thread: every session's connection and stall watch. It sleeps in `poll`
//! without a timeout while nothing is due, and never runs code of the host.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use nebd_abi::control::Message;
use nebd_abi::layout::LayoutVersion;
use nebd_abi::socket;
use rustix::event::{PollFd, PollFlags};
use rustix::net::{SocketAddrUnix, SocketFlags};

use crate::attachment::Attachment;
use crate::core::Core;
use crate::error::OpenError;
use crate::runtime::Runtime;
use crate::sync::{Promise, poll};

/// A new session, and where its opener waits.
pub(crate) struct Admission {
    pub(crate) core: Arc<Core>,
    pub(crate) opened: Arc<Promise<Result<(), OpenError>>>,
}

/// The body of the thread.
pub(crate) fn run(runtime: &Arc<Runtime>) {
    let mut attachments: Vec<Attachment> = Vec::new();
    loop {
        let now = Instant::now();
        attachments.extend(runtime.take_inbox().into_iter().map(|new| Attachment::new(new, now)));
        let mut knocks = Vec::new();
        attachments.iter_mut().for_each(|attachment| attachment.turn(now, &mut knocks));
        knock_all(knocks);

        let (over, left): (Vec<_>, Vec<_>) = attachments.into_iter().partition(Attachment::is_over);
        attachments = left;
        over.iter().for_each(|attachment| runtime.dismiss(attachment.core()));
        let retires = attachments.is_empty() && runtime.retire();
        // After `retire`, so that who waits for this knows whether to wait for the thread too.
        over.into_iter().for_each(|attachment| attachment.core().gone.keep(()));
        if retires {
            runtime.stop_complete();
            return;
        }
        for index in wait(runtime, &attachments) {
            if let Some(attachment) = attachments.get_mut(index) {
                attachment.receive(Instant::now());
            }
        }
    }
}

/// Sleeps until something is due; returns the attachments whose sockets are readable.
fn wait(runtime: &Runtime, attachments: &[Attachment]) -> Vec<usize> {
    let due = attachments.iter().filter_map(Attachment::due).min();
    let timeout = due.map(|due| due.saturating_duration_since(Instant::now()));
    let sockets = attachments.iter().enumerate();
    let sockets = sockets.filter_map(|(index, one)| one.socket().map(|fd| (index, fd)));
    let (indices, mut fds): (Vec<_>, Vec<_>) =
        sockets.map(|(index, fd)| (index, PollFd::from_borrowed_fd(fd, PollFlags::IN))).unzip();
    fds.push(PollFd::new(runtime.wake_doorbell(), PollFlags::IN));
    if !poll(&mut fds, timeout) {
        return Vec::new();
    }
    // Drained before the sessions are looked at: a wake that comes later stays.
    runtime.wake_doorbell().drain();
    let ready = indices.into_iter().zip(&fds).filter(|(_, fd)| !fd.revents().is_empty());
    ready.map(|(index, _)| index).collect()
}

/// Knocks at each door once, however many sessions are stalled behind it.
fn knock_all(mut paths: Vec<PathBuf>) {
    paths.sort_unstable();
    paths.dedup();
    for path in paths {
        // Whoever watches the server's door needs no more than the knock; nobody waits for an
        // answer, and a door that cannot be reached is tried again while the stall lasts.
        let _ = knock(&path);
    }
}

fn knock(path: &std::path::Path) -> std::io::Result<()> {
    let socket = connect(path)?;
    socket::send(&socket, &hello().encode(1), &[])?;
    socket::send(&socket, &Message::Ping.encode(2), &[])
}

/// Connects without waiting: a full backlog is an error, to be tried again.
pub(crate) fn connect(path: &std::path::Path) -> std::io::Result<std::os::fd::OwnedFd> {
    let socket = socket::seqpacket(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

/// The first message on each connection.
pub(crate) fn hello() -> Message {
    Message::Hello {
        layout_min: LayoutVersion::V1 as u32,
        layout_max: LayoutVersion::CURRENT as u32,
        features: 0,
        pid: std::process::id(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
    }
}
