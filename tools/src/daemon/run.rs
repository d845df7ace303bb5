//! `reapd run`: start, serve, stop.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use reap_fs::{Mount, MountConfig, MountError, StopOutcome, is_under};
use reap_prefetcher::{Server, ServerConfig};
use reap_store::{Error, Name, Node, NodeConfig, Profile};
use tokio::net::{TcpListener, UnixListener};
use tokio::signal::unix::{SignalKind, signal};

use super::arguments::Run;
use super::prepared::{Daemon, Wanted};
use crate::output::size;

/// How long `ready` waits to hear what the store cannot do.
const PROBE_DEADLINE: Duration = Duration::from_secs(5);
/// How long users of the mount may go on after SIGTERM.
const MOUNT_GRACE: Duration = Duration::from_secs(2);

/// A VM's userfaultfd, its socket and its pidfd, and one that is there for a moment.
const DESCRIPTORS_OF_A_VM: u64 = 4;
/// Packs, connections to a store, the mount, handshakes in progress, clients of the API.
const OTHER_DESCRIPTORS: u64 = 1024;

pub(super) fn run(arguments: &Run) -> Result<()> {
    start_log();
    let names: Vec<Name> =
        arguments.prepare.iter().map(|name| name.parse()).collect::<Result<_, _>>()?;
    check_places(arguments)?;
    let run_dir = RunDir::make(&arguments.run_dir)?;
    let node = Node::start(&NodeConfig {
        store_url: arguments.store.clone(),
        cache_dir: Some(arguments.cache.clone()),
        readers_dir: None,
        disk_cache_bytes: arguments.cache_size,
        disk_free_floor_bytes: arguments.cache_free_floor,
        plain_copies_bytes: arguments.plain_copies,
        memory_cache_bytes: arguments.memory_cache,
        prefetch_bytes: arguments.prefetch_budget,
    })?;
    // Before the mount: a taken address must not cost one.
    let metrics = match arguments.metrics {
        Some(address) => Some(node.block_on(listen_for_metrics(address))?),
        None => None,
    };
    let max_vms = room_for_vms();
    let server = Server::start(ServerConfig {
        max_vms,
        socket_mode: arguments.socket_mode,
        socket_uid: arguments.socket_uid,
        fault_deadline: Duration::from_secs(arguments.fault_deadline),
        settle: Duration::from_secs(arguments.settle),
    })
    .map_err(|error| Error::local("userfaultfd server", error))?;
    let mount = MountConfig {
        mount_point: arguments.mount.clone(),
        refuse_write_open: arguments.refuse_write_open,
    };
    let mount = Mount::start(node.clone(), &mount).map_err(|error| match error {
        MountError::System(..) | MountError::Fuse(..) => Error::local("mount", error),
        _ => Error::refused("mount", error),
    })?;
    tracing::info!(
        "serving {} on {}: memory cache {}, prefetch budget {}, disk cache {}, at most {max_vms} VMs by userfaultfd",
        arguments.store,
        mount.path().display(),
        size(arguments.memory_cache),
        size(node.prefetch_status().limit_bytes),
        size(arguments.cache_size)
    );
    let sockets = run_dir.path.join("uffd");
    let limit = arguments.working_set_size;
    let daemon = Arc::new(Daemon::new(node.clone(), server, &mount, sockets, limit));
    let served = node.block_on(serve(&daemon, &run_dir, names, metrics));
    stop(&daemon, mount, Duration::from_secs(arguments.stop_deadline));
    drop(run_dir);
    served
}

/// Says what the store cannot do. Reading needs none of it.
async fn probe_store(node: &Node) {
    if node.store().objects().local_root().is_some() {
        return;
    }
    match tokio::time::timeout(PROBE_DEADLINE, node.store().probe()).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            tracing::warn!("{error}; snapshots that are there are served all the same");
        }
        Err(_) => tracing::warn!("it is not known whether the store keeps create-only: no answer"),
    }
}

/// Most VMs that this process has descriptors for, once it may open as many as it can be allowed. One VM more is
/// refused, which is better than to fail anywhere.
fn room_for_vms() -> usize {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!("the limit on open files stays as it is: {error}");
    }
    let files = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    let room = files.saturating_sub(OTHER_DESCRIPTORS) / DESCRIPTORS_OF_A_VM;
    usize::try_from(room).unwrap_or(usize::MAX).min(ServerConfig::default().max_vms)
}

fn start_log() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("REAP_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_target(false)
        .init();
}

/// A daemon must not wait for its own mount.
fn check_places(arguments: &Run) -> Result<(), Error> {
    let mut places = vec![("the cache", arguments.cache.clone())];
    places.push(("the run directory", arguments.run_dir.clone()));
    if let Some(path) = arguments.store.strip_prefix("file://") {
        places.push(("the store", PathBuf::from(path)));
    }
    for (what, place) in places {
        if is_under(&place, &arguments.mount) {
            let text = format!("{what} lies under the mount point: choose another directory");
            return Err(Error::invalid(place.display(), text));
        }
    }
    Ok(())
}

/// The run directory and what we put there, taken away on drop.
struct RunDir {
    path: PathBuf,
    /// Held for its lock.
    _lock: std::fs::File,
}

impl RunDir {
    fn make(path: &Path) -> Result<Self, Error> {
        let local = |error: std::io::Error| Error::local(path.display(), error);
        std::fs::create_dir_all(path.join("uffd")).map_err(local)?;
        let path = path.canonicalize().map_err(local)?;
        let lock = std::fs::File::create(path.join("lock")).map_err(local)?;
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive).map_err(
            |_| Error::refused(path.display(), "another reapd runs with this run directory"),
        )?;
        let run_dir = Self { path, _lock: lock };
        // Left by a killed daemon; the lock says that it is gone.
        run_dir.clear();
        Ok(run_dir)
    }

    fn clear(&self) {
        for name in ["ready", "api.sock"] {
            let path = self.path.join(name);
            if let Err(error) = std::fs::remove_file(&path)
                && error.kind() != std::io::ErrorKind::NotFound
            {
                tracing::warn!("{}: {error}", path.display());
            }
        }
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        self.clear();
    }
}

async fn serve(
    daemon: &Arc<Daemon>,
    run_dir: &RunDir,
    names: Vec<Name>,
    metrics: Option<TcpListener>,
) -> Result<()> {
    // Before anything is ready: a signal that comes early ends us cleanly too.
    let (mut terminate, mut interrupt) =
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let ended = async move {
        tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
    };
    let api = run_dir.path.join("api.sock");
    let listener = UnixListener::bind(&api).map_err(|error| Error::local(api.display(), error))?;
    let private = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    std::fs::set_permissions(&api, private)?;
    let ready = async {
        let prepare = async {
            for name in names {
                daemon.prepare((name, Profile::default()), Wanted::default()).await?;
            }
            Ok::<_, Error>(())
        };
        let (prepared, ()) = tokio::join!(prepare, probe_store(&daemon.node));
        prepared?;
        std::fs::write(run_dir.path.join("ready"), format!("{}\n", std::process::id()))?;
        tracing::info!("ready");
        Ok::<_, anyhow::Error>(())
    };
    let serving = axum::serve(listener, super::api::router(daemon.clone()));
    let serving_metrics = async {
        match metrics {
            Some(listener) => {
                let router = super::api::metrics_router(daemon.clone());
                Ok(axum::serve(listener, router).await?)
            }
            None => Ok(()),
        }
    };
    let serving = async { Ok(serving.await?) };
    tokio::select! {
        served = async { tokio::try_join!(ready, serving, serving_metrics) } => served.map(|_| ()),
        () = ended => Ok(()),
    }
}

async fn listen_for_metrics(address: SocketAddr) -> Result<TcpListener, Error> {
    let local = |error: std::io::Error| {
        Error::local(format!("{address} (--metrics)"), format!("{error}: choose another address"))
    };
    let listener = TcpListener::bind(address).await.map_err(local)?;
    let address = listener.local_addr().map_err(local)?;
    tracing::info!("metrics at http://{address}/metrics");
    Ok(listener)
}

/// VMs get their memory before the mount goes, because what they lack comes from the same store.
fn stop(daemon: &Arc<Daemon>, mount: Mount, deadline: Duration) {
    let (handed_over, ended) = daemon.server.stop(deadline);
    if handed_over + ended > 0 {
        tracing::info!("{handed_over} VMs have all their memory and go on, {ended} were ended");
    }
    if mount.stop(MOUNT_GRACE) == StopOutcome::Aborted {
        tracing::warn!("the mount was in use: its users get errors from now on");
    }
    daemon.node.block_on(daemon.node.release_pins());
    tracing::info!("stopped");
}
