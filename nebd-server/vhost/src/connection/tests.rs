use std::io::Write;
use std::os::unix::net::UnixStream;

use rustix::fs::MemfdFlags;

use super::*;
use crate::memory::RegionSpec;
use crate::message::{RingFd, RingState};

fn pair() -> (UnixStream, Connection) {
    let (hypervisor, ours) = UnixStream::pair().unwrap();
    (hypervisor, Connection::new(ours.into(), Journal::create().unwrap()))
}

fn send_with_fds(socket: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    assert!(ancillary.push(SendAncillaryMessage::ScmRights(fds)));
    let slices = [IoSlice::new(bytes)];
    let sent = rustix::net::sendmsg(socket, &slices, &mut ancillary, SendFlags::empty()).unwrap();
    assert_eq!(sent, bytes.len());
}

fn memfd(name: &str) -> OwnedFd {
    rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC).unwrap()
}

fn identity(fd: impl AsFd) -> u64 {
    rustix::fs::fstat(fd).unwrap().st_ino
}

fn message(connection: &Connection) -> Envelope {
    match connection.peek(&mut Vec::new()).unwrap() {
        Peeked::Message(envelope) => envelope,
        other => panic!("{other:?}"),
    }
}

fn successor(connection: &Connection) -> Resumed {
    let socket = connection.socket().try_clone_to_owned().unwrap();
    let journal = Journal::map(connection.journal().fd().try_clone_to_owned().unwrap()).unwrap();
    Connection::resume(socket, journal).unwrap()
}

#[test]
fn a_peek_takes_nothing_and_brings_descriptors_each_time() {
    let (hypervisor, connection) = pair();
    assert!(matches!(connection.peek(&mut Vec::new()).unwrap(), Peeked::Nothing));
    let kick = Message::SetVringKick(RingFd { index: 0, has_fd: true });
    let file = memfd("kick");
    (&hypervisor).write_all(&Message::SetOwner.encode(false)).unwrap();
    send_with_fds(&hypervisor, &kick.encode(false), &[file.as_fd()]);
    for _ in 0..3 {
        // The next one's descriptors do not come with the first.
        let envelope = message(&connection);
        assert_eq!((envelope.message, envelope.fds.len()), (Message::SetOwner, 0));
    }
    connection.finish(message(&connection), b"", None, || Ok(())).unwrap();
    for _ in 0..3 {
        let envelope = message(&connection);
        assert_eq!(envelope.message, kick);
        assert_eq!(identity(&envelope.fds[0]), identity(&file));
    }
    connection.finish(message(&connection), b"", None, || Ok(())).unwrap();
    assert!(matches!(connection.peek(&mut Vec::new()).unwrap(), Peeked::Nothing));
    assert_eq!(connection.journal().count(), 2);
    drop(hypervisor);
    assert!(matches!(connection.peek(&mut Vec::new()).unwrap(), Peeked::Closed));
}

/// A stream may bring a message in any pieces, and its descriptors with any of them.
#[test]
fn a_message_in_pieces_is_awaited() {
    let region = RegionSpec { size: 4096, ..RegionSpec::default() };
    let next = Message::SetVringKick(RingFd { index: 0, has_fd: true });
    let third = memfd("third");
    let whole = Message::SetMemTable(vec![region; 2]).encode(true);
    let (first, second) = (memfd("first"), memfd("second"));
    for with_fds in 1..whole.len() {
        let (hypervisor, connection) = pair();
        let fds = [first.as_fd(), second.as_fd()];
        if with_fds % 2 == 0 {
            send_with_fds(&hypervisor, &whole[..with_fds], &fds);
            assert!(matches!(connection.peek(&mut Vec::new()).unwrap(), Peeked::Nothing));
            (&hypervisor).write_all(&whole[with_fds..]).unwrap();
        } else {
            (&hypervisor).write_all(&whole[..with_fds]).unwrap();
            assert!(matches!(connection.peek(&mut Vec::new()).unwrap(), Peeked::Nothing));
            send_with_fds(&hypervisor, &whole[with_fds..], &fds);
        }
        send_with_fds(&hypervisor, &next.encode(false), &[third.as_fd()]);
        let envelope = message(&connection);
        assert!(envelope.need_reply);
        let identities: Vec<u64> = envelope.fds.iter().map(identity).collect();
        assert_eq!(identities, [identity(&first), identity(&second)], "cut at {with_fds}");
        connection.finish(envelope, b"", None, || Ok(())).unwrap();
        let envelope = message(&connection);
        assert_eq!(envelope.message, next);
        assert_eq!(identity(&envelope.fds[0]), identity(&third));
    }
}

#[test]
fn nonsense_is_refused_and_a_cut_off_message_is_an_end() {
    let (hypervisor, connection) = pair();
    (&hypervisor).write_all(&[0xff; 12]).unwrap();
    assert!(matches!(
        connection.peek(&mut Vec::new()),
        Err(ConnectionError::Message(MessageError::Flags(_)))
    ));

    let (hypervisor, connection) = pair();
    let files: Vec<OwnedFd> = (0..16).map(|_| memfd("many")).collect();
    let fds: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
    send_with_fds(&hypervisor, &Message::SetOwner.encode(false), &fds);
    assert!(matches!(connection.peek(&mut Vec::new()), Err(ConnectionError::TooManyFds)));

    let (hypervisor, connection) = pair();
    let base = Message::GetVringBase(RingState::default()).encode(false);
    (&hypervisor).write_all(&base[..15]).unwrap();
    assert!(matches!(connection.peek(&mut Vec::new()).unwrap(), Peeked::Nothing));
    drop(hypervisor);
    assert!(matches!(connection.peek(&mut Vec::new()).unwrap(), Peeked::Closed));
}

#[test]
fn a_hypervisor_that_does_not_read_is_given_up() {
    let (hypervisor, connection) = pair();
    for _ in 0..2 {
        (&hypervisor).write_all(&Message::GetFeatures.encode(false)).unwrap();
    }
    let endless = vec![0; 64 << 20];
    let refused = connection.finish(message(&connection), b"", Some((&endless, None)), || Ok(()));
    assert!(matches!(refused, Err(ConnectionError::Deaf)));
    // Part of it went out, so nobody may go on here.
    assert!(matches!(successor(&connection), Resumed::Close));
}

#[test]
fn what_cannot_be_kept_is_not_answered() {
    let (hypervisor, connection) = pair();
    (&hypervisor).write_all(&Message::GetFeatures.encode(false)).unwrap();
    let refused = connection.finish(message(&connection), b"", Some((b"reply", None)), || {
        Err(io::Error::other("the store is gone"))
    });
    assert!(matches!(refused, Err(ConnectionError::Persist(_))));
    hypervisor.set_nonblocking(true).unwrap();
    let mut nothing = [0; 1];
    assert!(io::Read::read(&mut &hypervisor, &mut nothing).is_err());
    let Resumed::Continue(next) = successor(&connection) else { panic!("close") };
    assert_eq!(message(&next).message, Message::GetFeatures);
}

/// What stands in the hypervisor's socket, as whole replies of one byte.
fn replies(hypervisor: &UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    hypervisor.set_nonblocking(true).unwrap();
    let _ = io::Read::read_to_end(&mut &*hypervisor, &mut bytes);
    bytes
}

/// Every step of `finish` is a server's last, with and without a reply, with and without a message that
/// follows, and with a message cut into two pieces.
#[test]
fn a_death_at_every_step_is_told_apart() {
    let ring = |index| Message::GetVringBase(RingState { index, number: 0 });
    let mut seen = [0; 2];
    for has_reply in [false, true] {
        for followed in [false, true] {
            for cut in [0, 5, 12, 17] {
                for steps in 0..12 {
                    let (hypervisor, connection) = pair();
                    let first = ring(1).encode(false);
                    (&hypervisor).write_all(&first[..cut]).unwrap();
                    (&hypervisor).write_all(&first[cut..]).unwrap();
                    if followed {
                        // The same bytes again: nothing but the socket itself tells them apart.
                        (&hypervisor).write_all(&first).unwrap();
                    }
                    let reply: &[u8] = b"1";
                    let reply = has_reply.then_some((reply, None));
                    connection.steps_left.set(steps);
                    let died = connection.finish(message(&connection), b"state", reply, || Ok(()));
                    let died = died.is_err();
                    let sent = replies(&hypervisor).len();
                    match successor(&connection) {
                        Resumed::Close => {
                            assert!(died && has_reply);
                            seen[0] += 1;
                        }
                        Resumed::Continue(next) => {
                            seen[1] += usize::from(died);
                            check_rest(&hypervisor, &next, sent, has_reply, followed);
                        }
                    }
                }
            }
        }
    }
    // Before the reply and after it, for each way of sending.
    assert_eq!(seen[0], 2 * 2 * 4);
    assert!(seen[1] > seen[0]);
}

/// The successor deals with what is left: each message is answered once, and none is passed over.
fn check_rest(
    hypervisor: &UnixStream,
    next: &Connection,
    mut sent: usize,
    has_reply: bool,
    followed: bool,
) {
    let messages = 1 + u64::from(followed);
    while let Peeked::Message(envelope) = next.peek(&mut Vec::new()).unwrap() {
        let reply: &[u8] = b"2";
        next.finish(envelope, b"later", has_reply.then_some((reply, None)), || Ok(())).unwrap();
    }
    sent += replies(hypervisor).len();
    assert_eq!(next.journal().count(), messages);
    assert_eq!(sent as u64, if has_reply { messages } else { 0 });
}
