//! Beginnings: of the keeper, of servers, and of the keeper's next image.

use std::ffi::OsString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::time::Instant;

use nebd_abi::host::HostPage;
use rustix::event::EventfdFlags;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::pipe::PipeFlags;
use rustix::process::{Resource, Rlimit};

use super::adopt::{self, Estate};
use super::backoff::Backoff;
use super::config::{KeeperConfig, KeeperError};
use super::events::Events;
use super::mailbox::Mailbox;
use super::process::{Process, find_program, server_program};
use super::sockets::{self, Sockets};
use super::store::Store;
use super::stream::Stream;
use super::succession::{Candidate, Retired};
use super::supervisor::{Server, Standby, Supervisor};
use super::watch::Watch;
use super::{files, image};
use crate::notify::Notifier;
use crate::{names, sys};

/// Descriptors beside the store that the keeper and a server need.
const FDS_RESERVED: u64 = 128;

/// As many descriptors as this user may have; returns how many may be stored. A child has each one
/// twice for a moment, while they are put in order.
fn raise_descriptor_limit() -> usize {
    let mut limit = rustix::process::getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    match rustix::process::setrlimit(Resource::Nofile, raised) {
        Ok(()) => limit = raised,
        Err(error) => tracing::warn!(%error, "the limit of descriptors cannot be raised"),
    }
    let total = limit.current.unwrap_or(1 << 20).min(1 << 20);
    (total.saturating_sub(FDS_RESERVED) / 2) as usize
}

/// What a server leaves behind comes to us: its holder of memory ends after it, and nobody else may
/// be there to take note of it.
fn adopt_orphans() {
    let this = rustix::process::getpid();
    if let Err(error) = rustix::process::set_child_subreaper(Some(this)) {
        tracing::warn!(%error, "children of dead servers are left to init");
    }
}

/// What is passed on from image to image, or from keeper to keeper.
struct Held {
    sockets: Sockets,
    page: HostPage,
    probe: OwnedFd,
    life: Vec<OwnedFd>,
    life_read: OwnedFd,
}

impl Held {
    /// What was registered, and new ones of what was not.
    fn from_estate(
        config: &KeeperConfig,
        estate: &mut Estate,
        pipe: Option<(OwnedFd, OwnedFd)>,
    ) -> Result<Held, KeeperError> {
        let mut take = |name| estate.registered.remove(name);
        let sockets = match (take(names::CLIENT), take(names::ADMIN)) {
            (Some(client), Some(admin)) => Sockets { client, admin },
            _ => Sockets::create(config)?,
        };
        let page = match take(names::HOST) {
            Some(fd) => HostPage::open(fd)?,
            None => HostPage::create()?,
        };
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let probe = match take(names::PROBE) {
            Some(fd) => fd,
            None => rustix::event::eventfd(0, flags)
                .map_err(KeeperError::system("create an eventfd"))?,
        };
        let (life_read, write) = match pipe {
            Some((read, write)) => (read, write),
            None => rustix::pipe::pipe_with(PipeFlags::CLOEXEC)
                .map_err(KeeperError::system("create a pipe"))?,
        };
        // That of a registered server is of its own making.
        let life = [write].into_iter().chain(take(names::LIFE)).collect();
        Ok(Held { sockets, page, probe, life, life_read })
    }
}

impl Supervisor {
    /// A keeper on its state directory: from the earlier image of this process, with the server of a
    /// dead keeper, or from nothing.
    pub(super) fn begin(config: KeeperConfig) -> Result<Supervisor, KeeperError> {
        if config.socket_mode & !0o660 != 0 {
            return Err(KeeperError::Mode { mode: config.socket_mode });
        }
        let program = config.server_argv.first().cloned().unwrap_or_default();
        find_program(&program)?;
        sys::default_sigchld();
        adopt_orphans();
        let count_max = raise_descriptor_limit();
        let events = Events::new()?;
        let mut supervisor = match image::read()? {
            Some(image) => Supervisor::restore(config, events, image, count_max)?,
            None => Supervisor::fresh(config, events, count_max)?,
        };
        supervisor.watch_all()?;
        let now = Instant::now();
        supervisor.write_children();
        if supervisor.serving.is_none() {
            supervisor.begin_vacant(now);
        } else if supervisor.config.standby && supervisor.standby.is_none() {
            supervisor.standby_at = Some(now);
        }
        if supervisor.serving.as_ref().is_some_and(|server| server.ready)
            && let Some(superior) = &supervisor.superior
        {
            // It serves already. A service manager that is not told so would end us after a while.
            superior.ready();
        }
        // What was told to the image before, or while nobody listened, is not told again.
        supervisor.on_stop_reports(now);
        supervisor.reap_orphans();
        Ok(supervisor)
    }

    fn assemble(
        config: KeeperConfig,
        events: Events,
        lock: OwnedFd,
        mailbox: Mailbox,
        held: Held,
        store: Store,
    ) -> Supervisor {
        let Held { sockets, page, probe, life, life_read } = held;
        let backoff = || Backoff::new(config.restart_delay_min, config.restart_delay_max);
        Supervisor {
            backoff: backoff(),
            standby_backoff: backoff(),
            watch: Watch::new(config.hang_timeout),
            config,
            lock,
            events,
            mailbox,
            sockets,
            page,
            probe,
            life_read,
            life,
            store,
            serving: None,
            standby: None,
            candidate: None,
            retired: Vec::new(),
            vacancy: None,
            binary: None,
            predecessor: None,
            start_at: None,
            standby_at: None,
            stopping: None,
            replace_by: None,
            superior: Notifier::from_env(),
        }
    }

    fn fresh(
        config: KeeperConfig,
        events: Events,
        count_max: usize,
    ) -> Result<Supervisor, KeeperError> {
        files::create_directories(&config)?;
        let lock = files::lock(&config.state_dir)?.into();
        let mut mailbox = Mailbox::new(sockets::notify(&config.notify_socket())?);
        let pid = format!("{}\n", std::process::id());
        files::write(&config.state_dir, files::KEEPER_PID, &pid)?;
        let mut estate = adopt::collect(&config, &mut mailbox)?;
        let held = Held::from_estate(&config, &mut estate, None)?;
        let mut store = Store::new(count_max);
        for (name, fd) in estate.store {
            store.insert(&name, fd);
        }
        let mut new = Supervisor::assemble(config, events, lock, mailbox, held, store);
        match estate.server {
            Some(process) => {
                tracing::info!(pid = process.pid, "registered: it goes on");
                new.serving = Some(new.resumed(process, true));
                new.write_server_pid();
            }
            None => files::remove(&new.config.state_dir.join(files::SERVER_PID)),
        }
        Ok(new)
    }

    /// A server with all its time before it.
    pub(super) fn resumed(&self, process: Process, ready: bool) -> Server {
        let deadline = Instant::now() + self.config.start_timeout;
        // One that took over, and has not yet said who is to answer pings.
        let probes_by = (ready && self.page.silent_probes(0).is_none()).then_some(deadline);
        Server { process, ready, deadline, probes_by, stream: None, was_standby: false }
    }

    fn restore(
        config: KeeperConfig,
        events: Events,
        image: image::Image,
        count_max: usize,
    ) -> Result<Supervisor, KeeperError> {
        let mut store = Store::new(count_max);
        let mut estate = Estate::default();
        let (mut lock, mut mailbox, mut predecessor) = (None, None, None);
        let (mut life_read, mut life) = (None, Vec::new());
        let (mut serving, mut standby, mut channel, mut retired) = (None, None, None, Vec::new());
        let mut candidate = None;
        for entry in image.entries {
            match entry.role.as_str() {
                "lock" => lock = Some(entry.fd),
                "mailbox" => mailbox = Some(entry.fd),
                "life-read" => life_read = Some(entry.fd),
                "life" => life.push(entry.fd),
                "predecessor" => predecessor = Some(entry.fd),
                "channel" => channel = Some(entry.fd),
                "serving" => serving = entry.process(),
                "standby" => standby = entry.process(),
                "candidate" => candidate = entry.candidate(),
                "retired" => retired.extend(entry.process()),
                "store" => drop(store.insert(&entry.detail, entry.fd)),
                "held" => drop(estate.registered.insert(entry.detail, entry.fd)),
                other => tracing::warn!(role = other, "not known to this keeper; let go"),
            }
        }
        let missing = |what| KeeperError::Image { what };
        for name in [names::CLIENT, names::ADMIN, names::HOST, names::PROBE] {
            if !estate.registered.contains_key(name) {
                return Err(missing(name));
            }
        }
        let lock = lock.ok_or_else(|| missing("the lock"))?;
        let mailbox = Mailbox::new(mailbox.ok_or_else(|| missing("the notification socket"))?);
        let mut life = life.into_iter();
        let pipe = life_read.zip(life.next());
        let mut held = Held::from_estate(&config, &mut estate, pipe)?;
        held.life.extend(life);
        let mut new = Supervisor::assemble(config, events, lock, mailbox, held, store);
        new.serving = serving.map(|(process, ready)| new.resumed(process, ready));
        new.standby = standby
            .zip(channel)
            .map(|((process, _), socket)| Standby::new(process, Stream::resumed(socket)));
        new.candidate = candidate.map(|(process, seen)| Candidate { process, seen });
        new.retired = retired.into_iter().map(|(process, _)| Retired::new(process)).collect();
        new.binary = image.binary;
        new.predecessor = predecessor;
        tracing::info!(store = new.store.len(), "replaced by this image");
        Ok(new)
    }

    fn watch_all(&self) -> Result<(), KeeperError> {
        self.events.add_mailbox(&self.mailbox)?;
        self.events.add_listener(&self.sockets.client)?;
        self.processes().try_for_each(|process| self.events.add_process(process))
    }

    /// What every server and standby gets.
    fn common(&self) -> Vec<(&str, BorrowedFd<'_>)> {
        let mut fds = vec![
            (names::CLIENT, self.sockets.client.as_fd()),
            (names::ADMIN, self.sockets.admin.as_fd()),
            (names::HOST, self.page.fd()),
            (names::PROBE, self.probe.as_fd()),
            (names::LIFE, self.life_read.as_fd()),
        ];
        fds.extend(self.predecessor.as_ref().map(|fd| (names::PREDECESSOR, fd.as_fd())));
        fds
    }

    fn spawn(
        &self,
        fds: Vec<(&str, BorrowedFd<'_>)>,
        standby: bool,
    ) -> Result<Process, KeeperError> {
        let (list, mut fds): (Vec<&str>, Vec<BorrowedFd<'_>>) = fds.into_iter().unzip();
        let (program, long) = server_program(&self.config, self.binary.as_deref(), &list, standby)?;
        if let Some(long) = &long {
            fds.insert(0, long.as_fd());
        }
        let starting =
            Process::start(&program, &fds).map_err(KeeperError::system("start a server"))?;
        self.events.add_process(&starting.process)?;
        let role = if standby { files::Role::Other } else { files::Role::Serving };
        self.write_children_with(Some((&starting.process, role)));
        let process = starting.go();
        tracing::info!(pid = process.pid, standby, "started");
        Ok(process)
    }

    /// A server with the store.
    pub(super) fn start_server(&mut self, now: Instant) {
        let mut fds = self.common();
        fds.extend(self.store.iter().map(|(name, fd)| (name, fd.as_fd())));
        match self.spawn(fds, false) {
            Ok(process) => {
                self.serving = Some(self.resumed(process, false));
            }
            Err(error) => {
                let delay = self.backoff.failed();
                let source = std::error::Error::source(&error).map(ToString::to_string);
                tracing::error!(%error, source, ?delay, "no server could be started");
                self.start_at = Some(now + delay);
            }
        }
    }

    /// A standby, if one is wanted now.
    pub(super) fn start_standby(&mut self, now: Instant) {
        let ready = self.serving.as_ref().is_some_and(|s| s.ready);
        if !ready || self.standby.is_some() || self.stopping.is_some() {
            return;
        }
        match self.spawn_standby() {
            Ok(standby) => {
                self.standby = Some(standby);
                self.flush_streams();
            }
            Err(error) => {
                let source = std::error::Error::source(&error).map(ToString::to_string);
                tracing::error!(%error, source, "no standby could be started");
                self.standby_at = Some(now + self.standby_backoff.failed());
            }
        }
    }

    fn spawn_standby(&self) -> Result<Standby, KeeperError> {
        let failed = || KeeperError::system("create a channel");
        let flags = SocketFlags::CLOEXEC;
        let (ours, theirs) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
                .map_err(failed())?;
        rustix::io::ioctl_fionbio(&ours, true).map_err(failed())?;
        let mut fds = self.common();
        fds.push((names::STANDBY, theirs.as_fd()));
        let process = self.spawn(fds, true)?;
        Ok(Standby::new(process, Stream::new(ours, &self.store)))
    }

    /// Becomes a new image of the keeper's program, with everything held; servers do not notice.
    pub(super) fn replace_self(&mut self) {
        let program = match self.next_image() {
            Ok(program) => program,
            Err(error) => {
                tracing::error!(%error, "the keeper's own program cannot be found");
                return;
            }
        };
        tracing::info!("replacing the keeper's image");
        let mut writer = image::Writer::default();
        writer.fd("lock", "", self.lock.as_fd());
        writer.fd("mailbox", "", self.mailbox.as_fd());
        for (name, fd) in self.common().into_iter().take(4) {
            writer.fd("held", name, fd);
        }
        writer.fd("life-read", "", self.life_read.as_fd());
        self.life.iter().for_each(|fd| writer.fd("life", "", fd.as_fd()));
        self.predecessor.iter().for_each(|fd| writer.fd("predecessor", "", fd.as_fd()));
        self.serving.iter().for_each(|s| writer.process("serving", &s.process, s.ready));
        if let Some(standby) = &self.standby {
            writer.process("standby", &standby.process, true);
            writer.fd("channel", "", standby.stream.as_fd());
        }
        self.candidate.iter().for_each(|c| writer.candidate(&c.process, c.seen));
        self.retired.iter().for_each(|r| writer.process("retired", &r.process, true));
        self.binary.iter().for_each(|path| writer.binary(path));
        self.store.iter().for_each(|(name, fd)| writer.fd("store", name, fd.as_fd()));
        let error = writer.hand_over(program);
        tracing::error!(%error, "the keeper could not be replaced; the present one goes on");
    }

    fn next_image(&self) -> Result<impl Fn(i32) -> std::io::Error + use<>, KeeperError> {
        let mut argv = self.config.keeper_argv.clone().unwrap_or_default();
        if argv.is_empty() {
            let program = std::env::current_exe()
                .map_err(KeeperError::system("find the keeper's own program"))?
                .into_os_string();
            // The name of a file that was replaced by a newer one: that is the one we want.
            let bytes = program.as_bytes();
            let path = bytes.strip_suffix(b" (deleted)").unwrap_or(bytes).to_vec();
            argv.push(OsString::from_vec(path));
            argv.extend(std::env::args_os().skip(1));
        }
        argv[0] = find_program(&argv[0])?.into();
        Ok(move |list: i32| {
            let kept = std::env::vars_os().filter(|(name, _)| name != image::VARIABLE);
            let env = kept.chain([(image::VARIABLE.into(), list.to_string().into())]);
            match sys::Program::new(&argv, env) {
                Ok(program) => program.exec(),
                Err(error) => error,
            }
        })
    }
}
