//! Mounting, unmounting, and what can be wrong with a mount point.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use fuser::{BackgroundSession, Config, INodeNo, MountOption, Notifier, Session, SessionACL};
use reap_store::Node;
use rustix::mount::{UnmountFlags, unmount};

use crate::poison::Poison;
use crate::shim::Shim;

/// What the mount table calls the source of our mounts.
const SOURCE: &str = "reap";
/// FUSE threads at most: they only look up and hand on.
const MAX_THREADS: usize = 4;
/// The kernel ends our threads at once when the mount goes; where it could not be made to (not root,
/// and somebody holds a file open), the process must be able to end all the same.
const JOIN_TIMEOUT: Duration = Duration::from_secs(5);

/// How the mount is set up.
#[derive(Clone, Debug)]
pub struct MountConfig {
    /// An empty directory; made if it is not there.
    pub mount_point: PathBuf,
    /// Refuse to open files for writing, as a read-only file system does.
    pub refuse_write_open: bool,
}

/// Why the store cannot be mounted.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// Something is mounted there.
    #[error("{0}: something is mounted here already: unmount it or choose another directory")]
    InUse(PathBuf),
    /// It has files.
    #[error("{0}: the mount point is not empty: choose an empty directory")]
    NotEmpty(PathBuf),
    /// It is no directory.
    #[error("{0}: the mount point is not a directory")]
    NotADirectory(PathBuf),
    /// The kernel refused.
    #[error("{0}: {1}")]
    System(PathBuf, std::io::Error),
    /// No FUSE here, or not for us.
    #[error(
        "{0}: cannot mount: {1}: is /dev/fuse there and may this user open it (ls -l /dev/fuse; modprobe fuse)?"
    )]
    Fuse(PathBuf, std::io::Error),
}

/// How a mount ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopOutcome {
    /// Nobody used it.
    Clean,
    /// Somebody still used it when the time was over: they get errors from now on.
    Aborted,
}

/// A mount in service.
pub struct Mount {
    session: Option<BackgroundSession>,
    path: PathBuf,
    poison: Arc<Poison>,
    invalidator: Option<JoinHandle<()>>,
    passes_through: bool,
}

impl Mount {
    /// Mounts. A dead mount of ours, left by a killed process, is cleared away first.
    pub fn start(node: Node, config: &MountConfig) -> Result<Self, MountError> {
        let path = prepare(&config.mount_point)?;
        let owner = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
        let poison = Arc::new(Poison::default());
        let shim = Shim::new(node, owner, poison.clone());
        let passes_through = shim.passes_through.clone();
        let mut options = Config::default();
        options.mount_options = vec![
            MountOption::FSName(SOURCE.into()),
            // As text, because fuser keeps its own `Subtype` from a kernel that mounts directly.
            MountOption::CUSTOM("subtype=reap".into()),
            MountOption::DefaultPermissions,
            MountOption::NoSuid,
            MountOption::NoDev,
            MountOption::NoAtime,
        ];
        if config.refuse_write_open {
            options.mount_options.push(MountOption::RO);
        }
        if owner.0 == 0 {
            // VMMs run as users of their own.
            options.acl = SessionACL::All;
        }
        let threads = std::thread::available_parallelism().map_or(2, usize::from);
        options.n_threads = Some(threads.clamp(2, MAX_THREADS));
        options.clone_fd = true;
        let fuse = |error| MountError::Fuse(path.clone(), error);
        let session = Session::new(shim, &path, &options).map_err(fuse)?;
        // The kernel has said hello. To name it a file is for root alone.
        let passes_through = passes_through.load(Ordering::Relaxed) && owner.0 == 0;
        let session = session.spawn().map_err(fuse)?;
        let notifier = session.notifier();
        // From here on a failure unmounts, because `mount` is dropped.
        let mut mount =
            Self { session: Some(session), path, poison, invalidator: None, passes_through };
        let poison = mount.poison.clone();
        let invalidator = std::thread::Builder::new()
            .name("invalidate".into())
            .spawn(move || drop_poisoned(&notifier, &poison))
            .map_err(|error| MountError::System(mount.path.clone(), error))?;
        mount.invalidator = Some(invalidator);
        Ok(mount)
    }

    /// Where it is mounted, without symbolic links.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether reads of a file with a plain copy ([`reap_store::Snapshot::plain_copy`]) are handed on to it by the kernel: Linux 6.9
    /// or later, and we are root.
    pub fn passes_through(&self) -> bool {
        self.passes_through
    }

    /// Unmounts. While somebody uses it, waits for up to `grace`, serving on; then takes it away.
    pub fn stop(mut self, grace: Duration) -> StopOutcome {
        self.end(grace)
    }

    fn end(&mut self, grace: Duration) -> StopOutcome {
        let Some(session) = self.session.take() else { return StopOutcome::Clean };
        let by = Instant::now() + grace;
        let outcome = loop {
            match unmount(&self.path, UnmountFlags::NOFOLLOW) {
                Err(rustix::io::Errno::BUSY) if Instant::now() < by => {
                    std::thread::sleep(Duration::from_millis(50));
                }
                Err(rustix::io::Errno::PERM) => {
                    // Not root: fuser asks fusermount, which detaches; users keep what they have.
                    return match self.join(by, move || session.umount_and_join()) {
                        true => StopOutcome::Clean,
                        false => StopOutcome::Aborted,
                    };
                }
                Err(error) => {
                    if error != rustix::io::Errno::BUSY {
                        tracing::warn!("{}: unmount: {error}", self.path.display());
                    }
                    self.abort();
                    break StopOutcome::Aborted;
                }
                Ok(()) => break StopOutcome::Clean,
            }
        };
        self.join(Instant::now() + JOIN_TIMEOUT, move || session.join());
        outcome
    }

    /// Waits until `end` is done and our threads with it, but not after `by`.
    fn join(
        &mut self,
        by: Instant,
        end: impl FnOnce() -> std::io::Result<()> + Send + 'static,
    ) -> bool {
        let ending = std::thread::spawn(end);
        while !ending.is_finished() {
            if Instant::now() >= by {
                tracing::warn!("{}: still in use; ends with this process", self.path.display());
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        if let Ok(Err(error)) = ending.join() {
            tracing::debug!("{}: {error}", self.path.display());
        }
        // The connection has ended, so it waits for nothing but this.
        self.poison.close();
        if let Some(invalidator) = self.invalidator.take()
            && invalidator.join().is_err()
        {
            tracing::error!("the invalidating thread panicked; this is a bug");
        }
        true
    }

    fn abort(&self) {
        tracing::warn!("{}: in use: taken away from its users", self.path.display());
        // Forced, which ends the connection: whoever waits for us gets an error and no one hangs.
        // The mount itself is busy all the same, so it is detached.
        for flags in [UnmountFlags::FORCE, UnmountFlags::DETACH] {
            match unmount(&self.path, flags | UnmountFlags::NOFOLLOW) {
                Ok(()) => return,
                Err(error) => tracing::debug!("{}: {error}", self.path.display()),
            }
        }
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        self.end(Duration::ZERO);
    }
}

/// Whether `path`, or what it will be once made, lies at or under `mount_point`: a daemon that
/// reads through its own mount waits for itself.
pub fn is_under(path: &Path, mount_point: &Path) -> bool {
    resolved(path).starts_with(resolved(mount_point))
}

/// The path without symbolic links, as far as it exists.
fn resolved(path: &Path) -> PathBuf {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    for ancestor in absolute.ancestors() {
        if let Ok(real) = ancestor.canonicalize()
            && let Ok(rest) = absolute.strip_prefix(ancestor)
        {
            // Joining nothing would add a slash, and a file with one is "not a directory".
            return if rest.as_os_str().is_empty() { real } else { real.join(rest) };
        }
    }
    absolute
}

fn prepare(mount_point: &Path) -> Result<PathBuf, MountError> {
    let system = |error| MountError::System(mount_point.to_owned(), error);
    // The mount table knows no symbolic links, and a dead mount itself cannot be resolved.
    let absolute = resolved(mount_point);
    // Asking the file system about a dead mount only gives ENOTCONN: the table knows it. Several
    // may lie on each other.
    while std::fs::metadata(&absolute)
        .is_err_and(|error| error.raw_os_error() == Some(libc::ENOTCONN))
        && mounts_at(&absolute).last().is_some_and(|mount| mount.is_ours)
    {
        tracing::warn!("{}: a dead mount of ours is cleared away", absolute.display());
        unmount(&absolute, UnmountFlags::DETACH).map_err(|error| system(error.into()))?;
    }
    match std::fs::metadata(&absolute) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            std::fs::create_dir_all(&absolute).map_err(system)?;
        }
        Err(error) => return Err(system(error)),
        Ok(metadata) if !metadata.is_dir() => return Err(MountError::NotADirectory(absolute)),
        Ok(_) => {}
    }
    let path = absolute.canonicalize().map_err(system)?;
    if !mounts_at(&path).is_empty() {
        return Err(MountError::InUse(path));
    }
    match std::fs::read_dir(&path).map_err(system)?.next() {
        None => Ok(path),
        Some(_) => Err(MountError::NotEmpty(path)),
    }
}

struct Mounted {
    is_ours: bool,
}

/// What is mounted at exactly `path`, lowest first.
fn mounts_at(path: &Path) -> Vec<Mounted> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let at = |line: &str| {
        let (left, right) = line.split_once(" - ")?;
        let fields: Vec<&str> = left.split(' ').collect();
        let place = fields.get(4)?.replace("\\040", " ").replace("\\134", "\\");
        let mut source = right.split(' ');
        let is_ours = source.next()?.starts_with("fuse") && source.next()? == SOURCE;
        (Path::new(&place) == path).then_some(Mounted { is_ours })
    };
    table.lines().filter_map(at).collect()
}

/// Drops pages that somebody dirtied, until the mount ends.
fn drop_poisoned(notifier: &Notifier, poison: &Poison) {
    while let Some((ino, range)) = poison.next() {
        let offset = i64::try_from(range.start).unwrap_or(0);
        tracing::error!("inode {ino} was written to through a mapping at {offset}; dropped");
        // A length of zero would mean "to the end", which is right for what cannot be counted.
        let length = i64::try_from(range.end - range.start).unwrap_or(0);
        if let Err(error) = notifier.inval_inode(INodeNo(ino), offset, length) {
            tracing::error!("inode {ino}: dirtied pages cannot be dropped: {error}");
        }
    }
}
