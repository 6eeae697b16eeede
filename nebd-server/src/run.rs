//! From an exec to a serving server.
//!
//! ```text
//!  inherit ─► shards, control ─► (standby: follow the store, prepare, until ACTIVATE)
//!     ─► predecessor confirmed dead ─► claim the generation ─► READY ─► resume sessions ─► serve
//!                                         └─ lost the race: exit, somebody else owns the host's volumes
//! ```
//!
//! Listening comes first: whoever connects while volumes are still being opened waits for its own
//! volume alone.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nebd_abi::host::HostPage;
use nebd_abi::layout::SessionId;
use nebd_abi::region::RegionError;
use nebd_backend::{
    Backend, FdStore, FileBackend, FileConfig, FileEngineChoice, LaneConfig, MemBackend,
    NullBackend,
};
use nebd_keeper::inherit::{InheritError, Inherited};
use nebd_keeper::notify::{Notifier, Reregister};
use nebd_vhost::memory::Backing;
use rustix::event::{PollFd, PollFlags};
use rustix::process::Signal;

use crate::config::{Config, ConfigError};
use crate::control::{Control, ControlInputs, NoticeSink, doorbell};
use crate::fd_store::ServerStore;
use crate::frontend::{Frontends, Places};
use crate::holdings::{Holdings, LOCK};
use crate::registry::{Registry, RegistryError, host_major};
use crate::server::{AttachRequest, Server, ServerParts};
use crate::service_manager::ServiceManager;
use crate::session::MemoryQuota;
use crate::shard::{EventSink, ShardContext, SpinBudget};
use crate::successor::Resumption;
use crate::tenure::Tenure;
use crate::upgrade::{Probation, Report};
use crate::work_sign::WorkSign;

/// The descriptor table's first size; 8 bytes each.
const DESCRIPTORS_MIN: usize = 4096;
/// How many a server has for each that is stored: the stored one, and what is opened anew.
const DESCRIPTORS_PER_STORED: usize = 3;

/// Why a server cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The configuration is off.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// What the keeper passed is not usable.
    #[error("cannot take over what the keeper passed")]
    Inherit(#[from] InheritError),
    /// The host page is not usable.
    #[error("the host page is not usable")]
    Host(#[source] RegionError),
    /// The registry is not usable.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// Another server runs without a keeper on the same state directory.
    #[error("another nebd-server uses {0}; stop it first, or choose another --state-dir")]
    Locked(PathBuf),
    /// A socket cannot be made.
    #[error("cannot listen on {path}")]
    Listen {
        /// Which socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The configuration insists on an engine that the kernel refuses.
    #[error("configuration key file.engine is io_uring, but {0}; use auto or threads")]
    Engine(#[source] nebd_backend::UringRefusal),
    /// A system call failed.
    #[error("cannot {action}")]
    System {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

pub(crate) fn system<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> RunError {
    move |error| RunError::System { action, source: error.into() }
}

/// Serves until the process ends; returns early only if another process owns the host's volumes.
pub fn run(config: &Config, standby: bool, mut inherited: Inherited) -> Result<(), RunError> {
    prelude(config)?;
    let alone = inherited.host.is_none();
    let lock: Option<OwnedFd> = if alone { Some(lock(&config.state_dir)?.into()) } else { None };
    let host = match inherited.host.take() {
        Some(fd) => HostPage::open(fd),
        None => HostPage::create(),
    };
    let host = Arc::new(host.map_err(RunError::Host)?);
    let channel = inherited.standby.take().filter(|_| standby);
    let heir = match channel {
        Some(channel) => crate::standby::stand_by(config, host, inherited, channel)?,
        None => Some(Heir::unprepared(config, host, inherited, lock)?),
    };
    let Some(heir) = heir else { return Ok(()) };
    heir.take_over(config, standby)
}

/// A server that is set up, and serves as soon as the owner before it is dead.
pub(crate) struct Heir {
    pub(crate) assembly: Assembly,
    /// The last owner.
    pub(crate) predecessor: Option<OwnedFd>,
    /// Sessions that are mapped.
    pub(crate) sessions: HashMap<SessionId, AttachRequest>,
}

impl Heir {
    fn unprepared(
        config: &Config,
        host: Arc<HostPage>,
        mut inherited: Inherited,
        lock: Option<OwnedFd>,
    ) -> Result<Heir, RunError> {
        let predecessor = inherited.predecessor.take();
        if let Some(predecessor) =
            predecessor.as_ref().filter(|_| inherited.client.is_none() || inherited.admin.is_none())
        {
            // It may listen where this one is to.
            confirm_death(predecessor).map_err(system("confirm the predecessor's death"))?;
        }
        let ingredients = Ingredients::of(config, host, inherited, lock)?;
        let assembly = assemble(config, ingredients)?;
        Ok(Heir { assembly, predecessor, sessions: HashMap::new() })
    }

    fn take_over(self, config: &Config, standby: bool) -> Result<(), RunError> {
        let Heir { assembly, predecessor, sessions } = self;
        let start = Instant::now();
        let (server, holdings) = (assembly.server.clone(), assembly.holdings.clone());
        let host = &holdings.host;
        // The owner of `seen` is confirmed dead before its generation is replaced; if somebody else
        // replaces it meanwhile, the claim fails.
        let seen = host.generation();
        if let Some(predecessor) = predecessor {
            confirm_death(&predecessor).map_err(system("confirm the predecessor's death"))?;
        }
        let service_manager = ServiceManager::of(holdings.notifier.clone());
        if let Some(service_manager) = &service_manager {
            service_manager.record_death(host);
            if let Some(lock) = holdings.fds.get(LOCK) {
                let kept = service_manager.keep(host, lock.as_fd());
                kept.map_err(system("have the host page kept"))?;
            }
        }
        // While nobody serves: the owner cannot change it any more.
        server.registry.reload()?;
        crate::failpoint!("before-claim");
        let Some(generation) = host.claim(seen) else {
            tracing::info!(%seen, "another server has taken over; this one is not needed");
            return Ok(());
        };
        crate::failpoint!("after-claim");
        let last_death = host.death_of(seen);
        server.tenure.begin(generation, last_death);
        if let Some(service_manager) = &service_manager {
            service_manager.note_owner().map_err(system("have the pidfd kept"))?;
        }
        tracing::info!(%generation, pid = std::process::id(), standby, "taking over");
        let unplanned = crate::metrics::unplanned(seen, last_death);
        crate::metrics::start(&*server.store, generation, unplanned);
        *server.upgrades.report() = Report::load(&config.state_dir, &holdings.binary);
        let resumption = Resumption::reserve(&server, sessions, &[]);
        host.announce_probes(1 + server.shards.len());
        server.work_sign.note();
        if let Some(notifier) = &holdings.notifier {
            notifier.ready();
        }
        if seen.0 > 0 {
            crate::metrics::note_phase("start", start.elapsed());
        }
        crate::failpoint!("after-ready");
        server.jobs.spawn(move || _ = resumption.run());
        assembly.serve(config, None)
    }
}

/// What comes before anything that could be owned.
pub(crate) fn prelude(config: &Config) -> Result<(), RunError> {
    raise_descriptor_limit();
    die_of_panics();
    crate::fatal::die_at_once();
    if let Err(error) = crate::memory_holder::start() {
        tracing::warn!(%error, "no holder of the memory: a crash will take longer");
    }
    config.socket_mode()?;
    create_private(&config.state_dir).map_err(system("create the state directory"))?;
    #[cfg(feature = "test-hooks")]
    crate::failpoint::active::load(&config.state_dir);
    Ok(())
}

/// What a server is set up with.
pub(crate) struct Ingredients {
    pub(crate) host: Arc<HostPage>,
    pub(crate) client: OwnedFd,
    pub(crate) admin: OwnedFd,
    pub(crate) probe: Option<OwnedFd>,
    pub(crate) life: Option<OwnedFd>,
    pub(crate) lock: Option<OwnedFd>,
    pub(crate) store: BTreeMap<String, OwnedFd>,
}

impl Ingredients {
    /// What was inherited, and what is missing made.
    pub(crate) fn of(
        config: &Config,
        host: Arc<HostPage>,
        inherited: Inherited,
        lock: Option<OwnedFd>,
    ) -> Result<Ingredients, RunError> {
        let mode = config.socket_mode()?;
        let (admin, client) = (inherited.admin, inherited.client);
        // The client socket comes last: whoever finds it finds the other.
        let admin = listener(admin, || sockets::stream(&config.admin_socket(), mode, config))?;
        let client = listener(client, || sockets::packet(&config.socket, mode, config))?;
        let (probe, life, store) = (inherited.probe, inherited.life, inherited.store);
        Ok(Ingredients { host, client, admin, probe, life, lock, store })
    }
}

/// A server that serves nothing yet.
pub(crate) struct Assembly {
    pub(crate) server: Arc<Server>,
    pub(crate) holdings: Arc<Holdings>,
    pub(crate) control: Control,
    admin: OwnedFd,
    life: Option<OwnedFd>,
}

/// Sets up a server: threads that sleep, nothing that is owned.
pub(crate) fn assemble(config: &Config, given: Ingredients) -> Result<Assembly, RunError> {
    make_room_for_descriptors(given.store.len());
    let notifier = Notifier::from_env().map(Arc::new);
    let store = Arc::new(ServerStore::new(given.store, notifier.clone()));
    let host = given.host;
    let passed = [
        (nebd_keeper::names::CLIENT, given.client.try_clone()),
        (nebd_keeper::names::ADMIN, given.admin.try_clone()),
        (nebd_keeper::names::HOST, host.fd().try_clone_to_owned()),
    ];
    let given_probe = match (given.probe, ServiceManager::of(notifier.clone())) {
        (None, Some(service_manager)) => {
            service_manager.probe().map_err(system("make a doorbell"))?
        }
        (probe, _) => probe,
    };
    let life = given.life.as_ref().map(|fd| (nebd_keeper::names::LIFE, fd.try_clone()));
    let probe = given_probe.as_ref().map(|fd| (nebd_keeper::names::PROBE, fd.try_clone()));
    let lock = given.lock.map(|fd| (LOCK, Ok(fd)));
    let fds = passed.into_iter().chain(life).chain(probe).chain(lock);
    let fds = fds.map(|(name, fd)| Ok((name, fd?))).collect::<io::Result<_>>();
    let tenure = Arc::new(Tenure::default());
    let work_sign = WorkSign::new(host.clone(), notifier.clone());
    let holdings = Arc::new(Holdings {
        fds: fds.map_err(system("duplicate descriptors"))?,
        store: store.clone(),
        host: host.clone(),
        tenure: tenure.clone(),
        notifier,
        binary: std::env::current_exe().map_err(system("find this executable"))?,
        state_dir: config.state_dir.clone(),
        freeze: Duration::from_millis(config.upgrade.freeze_ms),
        step: Duration::from_millis(config.upgrade.step_timeout_ms),
    });

    let doorbell = doorbell().map_err(system("make a doorbell"))?;
    let (notices, notice_receiver) = NoticeSink::new(doorbell.clone());
    let (events, shard_events) = EventSink::new(doorbell.clone());
    let server = Arc::new(build(config, &host, work_sign, tenure, store, notices, events)?);
    let inputs = ControlInputs {
        listener: given.client,
        doorbell,
        notices: notice_receiver,
        shard_events,
        probe: given_probe,
    };
    let control =
        Control::new(server.clone(), inputs).map_err(system("set up the control loop"))?;
    Ok(Assembly { server, holdings, control, admin: given.admin, life: given.life })
}

impl Assembly {
    pub(crate) fn host(&self) -> &HostPage {
        &self.holdings.host
    }

    /// Registers with the next keeper if this one is gone. A service manager has no life pipe: it
    /// does not die before its services.
    fn watch_keeper(&mut self) -> Result<(), RunError> {
        match (&self.holdings.notifier, self.life.take()) {
            (Some(notifier), Some(life)) => {
                watch_keeper(Reregister::new(notifier.clone(), life), self.holdings.clone())
            }
            _ => Ok(()),
        }
    }

    /// Tells the keeper or service manager that this process is the server now.
    pub(crate) fn announce(&mut self) {
        // First: this keeper may die before it has heard.
        if let Err(error) = self.watch_keeper() {
            tracing::error!(%error, "the next keeper will not be found");
        }
        if let Some(notifier) = &self.holdings.notifier {
            notifier.main_pid(std::process::id());
        }
    }

    /// Returns once they know it, and have been told all that belongs to it.
    pub(crate) fn settle(&self) {
        self.host().announce_probes(1 + self.server.shards.len());
        self.server.work_sign.note();
        if let Some(notifier) = &self.holdings.notifier {
            notifier.ready();
        }
        let service_manager = ServiceManager::of(self.holdings.notifier.clone());
        if let Some(Err(error)) = service_manager.map(|manager| manager.note_owner()) {
            tracing::warn!(%error, "the service manager does not have this server's pidfd");
        }
        if let Err(error) = self.server.store.barrier() {
            tracing::warn!(%error, "the service manager has not confirmed the new server");
        }
    }

    /// Serves until the process ends, on probation if one is given.
    pub(crate) fn serve(
        self,
        config: &Config,
        probation: Option<Probation>,
    ) -> Result<(), RunError> {
        let mut this = self;
        this.watch_keeper()?;
        let Assembly { server, holdings, control, admin, .. } = this;
        server.frontends.open(&server.store);
        let admin = crate::admin::spawn(admin.into(), server.clone())
            .map_err(system("start the admin service"))?;
        server.upgrades.set_admin(admin);
        let service_manager = ServiceManager::of(holdings.notifier.clone());
        let probe = holdings.fds.get(nebd_keeper::names::PROBE).map(|fd| fd.try_clone());
        if let (Some(service_manager), Some(probe)) = (service_manager, probe) {
            probe
                .and_then(|probe| service_manager.give_signs_of_life(&holdings.host, probe))
                .map_err(system("give signs of life"))?;
        }
        crate::metrics::endpoint::spawn(config, server.clone());
        crate::upgrade::spawn(&server, &holdings).map_err(system("start a thread"))?;
        if let Some(probation) = probation {
            probation.spawn(&server, &holdings).map_err(system("start a thread"))?;
        }
        control.run().map_err(system("wait for events"))
    }
}

fn build(
    config: &Config,
    host: &Arc<HostPage>,
    work_sign: WorkSign,
    tenure: Arc<Tenure>,
    store: Arc<ServerStore>,
    notices: NoticeSink,
    events: EventSink,
) -> Result<Server, RunError> {
    let lane = LaneConfig { io_uring: config.file.engine != "threads", ..LaneConfig::default() };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let shard_count = if config.shards == 0 { cores } else { config.shards };
    let shard_count = shard_count.min(nebd_abi::host::PROBES_MAX - 1);
    let context = ShardContext {
        work_sign: work_sign.clone(),
        tenure: tenure.clone(),
        lane,
        spin: Duration::from_micros(config.ring.spin_us),
        spin_budget: SpinBudget::of(config.ring.spin_cores_max, shard_count),
        batch: config.ring.batch.max(1),
        stall_alarm: Duration::from_millis(config.ring.stall_alarm_ms),
        events,
        beacons: crate::shard::beacons(shard_count),
    };
    let shards = (0..shard_count)
        .map(|index| crate::shard::spawn(index, context.clone()))
        .collect::<io::Result<Vec<_>>>()
        .map_err(system("start a shard"))?;
    if let Err(error) = crate::memory_holder::note_rings() {
        tracing::warn!(%error, "a crash will hold the volumes' locks longer");
    }
    let (backends, file_engine) = backends(config, &store)?;
    Ok(Server::new(ServerParts {
        registry: Registry::load(&config.state_dir)?,
        store,
        work_sign,
        tenure,
        // Generation 0 means that nobody on this host can have had a volume open.
        host_major: host_major(&config.state_dir, host.generation().0 == 0)?,
        backends,
        file_engine,
        shards,
        memory_quota: Arc::new(MemoryQuota::new(config.access.memory_gib_max << 30)),
        guest_memory: match config.vhost_user.unsealed_memory {
            true => Backing::AnyFile,
            false => Backing::Sealed,
        },
        notices,
        frontends: Frontends::new(Places::of(config)?).map_err(system("set up the frontends"))?,
    }))
}

fn backends(
    config: &Config,
    store: &Arc<ServerStore>,
) -> Result<(Vec<Box<dyn Backend>>, String), RunError> {
    let image_dir = config.image_dir();
    create_private(&image_dir).map_err(system("create the image directory"))?;
    let engine = match config.file.engine.as_str() {
        "io_uring" => FileEngineChoice::IoUring,
        "threads" => FileEngineChoice::Threads,
        _ => FileEngineChoice::Auto,
    };
    let pool_threads = config.file.threads.max(1);
    let file = FileBackend::new(FileConfig { engine, pool_threads, ..FileConfig::new(image_dir) })
        .map_err(RunError::Engine)?;
    let file_engine = file.engine().to_string();
    #[allow(unused_mut, reason = "test builds add one")]
    let mut backends: Vec<Box<dyn Backend>> =
        vec![Box::new(NullBackend), Box::new(MemBackend::new(store.clone())), Box::new(file)];
    #[cfg(feature = "test-hooks")]
    if let Some(fence_test) = nebd_backend::FenceTestBackend::from_env() {
        backends.push(Box::new(fence_test));
    }
    Ok((backends, file_engine))
}

/// Kills the predecessor if it still runs, and waits until all of its threads are gone.
pub(crate) fn confirm_death(predecessor: &OwnedFd) -> io::Result<()> {
    match rustix::process::pidfd_send_signal(predecessor, Signal::KILL) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => {}
        Err(error) => return Err(error.into()),
    }
    let mut fds = [PollFd::new(predecessor, PollFlags::IN)];
    loop {
        match rustix::event::poll(&mut fds, None) {
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn listener(
    inherited: Option<OwnedFd>,
    make: impl FnOnce() -> Result<OwnedFd, RunError>,
) -> Result<OwnedFd, RunError> {
    inherited.map_or_else(make, Ok)
}

/// Without a keeper, one server a state directory.
fn lock(state_dir: &Path) -> Result<std::fs::File, RunError> {
    let path = state_dir.join("server.lock");
    let file = std::fs::File::create(&path).map_err(system("create server.lock"))?;
    file.try_lock().map_err(|_| RunError::Locked(state_dir.into()))?;
    Ok(file)
}

/// What guests store is nobody else's to read.
fn create_private(dir: &Path) -> io::Result<()> {
    // To make what exists would wait for whatever else is changed in the directory above.
    if dir.is_dir() {
        return Ok(());
    }
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)
}

/// A thread that panicked leaves its queues unserved; a successor serves them within milliseconds.
fn die_of_panics() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        std::process::abort();
    }));
}

fn raise_descriptor_limit() {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let raised = rustix::process::Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(error) = rustix::process::setrlimit(rustix::process::Resource::Nofile, raised) {
        tracing::warn!(%error, "cannot raise the descriptor limit");
    }
}

/// Grows the descriptor table while there is one thread: later each doubling waits for a grace
/// period of RCU, some 20 ms of every guest's time.
fn make_room_for_descriptors(stored: usize) {
    let wanted = (DESCRIPTORS_MIN + stored * DESCRIPTORS_PER_STORED) as u64;
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    let last = wanted.min(limit.unwrap_or(u64::MAX)).saturating_sub(1);
    // Closed at once; the table stays. A failure leaves it as it was.
    let last = i32::try_from(last).unwrap_or(i32::MAX);
    let _ = rustix::io::fcntl_dupfd_cloexec(std::io::stderr(), last);
}

fn watch_keeper(watch: Reregister, held: Arc<Holdings>) -> Result<(), RunError> {
    let work = move || {
        // Nobody stops this thread; the process ends with it inside.
        let Ok((stop, _held_open)) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
        else {
            tracing::error!("no pipe: the next keeper will not be found");
            return;
        };
        if let Err(error) = watch.run(stop.as_fd(), &*held) {
            tracing::error!(%error, "the next keeper will not be found");
        }
    };
    std::thread::Builder::new()
        .name("nebd-life".into())
        .spawn(work)
        .map_err(system("start a thread"))?;
    Ok(())
}

mod sockets {
    //! Sockets of a server that has no keeper to make them.

    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn bind(
        path: &Path,
        kind: rustix::net::SocketType,
        mode: u32,
        config: &Config,
    ) -> io::Result<OwnedFd> {
        use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags};
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent)?;
        }
        // The lock on the state directory is ours: what lies here is a dead server's, unless
        // another state directory shares the socket path.
        if UnixStream::connect(path).is_ok() || nebd_abi::socket::connect(path).is_ok() {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)?;
        // Nobody can connect before `listen`, so the mode is right before it matters.
        rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
        if let Some(gid) = config.access.gid {
            std::os::unix::fs::chown(path, None, Some(gid))?;
        }
        rustix::net::listen(&socket, 4096)?;
        Ok(socket)
    }

    pub(super) fn packet(path: &Path, mode: u32, config: &Config) -> Result<OwnedFd, RunError> {
        bind(path, rustix::net::SocketType::SEQPACKET, mode, config)
            .map_err(|source| RunError::Listen { path: path.into(), source })
    }

    pub(super) fn stream(path: &Path, mode: u32, config: &Config) -> Result<OwnedFd, RunError> {
        bind(path, rustix::net::SocketType::STREAM, mode, config)
            .map_err(|source| RunError::Listen { path: path.into(), source })
    }
}
