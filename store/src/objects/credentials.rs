//! Where a remote store's credentials come from. For S3 the shared credentials file is read here,
//! and read again when it changes or is not accepted any more; all other sources are
//! `object_store`'s, which renews what can be renewed.

use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use object_store::CredentialProvider;
use object_store::aws::AwsCredential;
use parking_lot::Mutex;

use crate::Error;

/// The file is looked at this often while requests are made: one `stat`.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Longest file that is read.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// A lookup of environment variables; those that are empty count as not set.
type Lookup<'a> = &'a dyn Fn(&str) -> Option<String>;

/// Where credentials come from.
#[derive(Clone, Debug)]
pub(super) enum Credentials {
    /// A local store needs none.
    None,
    /// A profile of AWS's shared credentials file.
    SharedFile(Arc<SharedFile>),
    /// What `object_store` finds in the environment, described.
    Environment(String),
}

impl Credentials {
    /// Decides for a store of this URL scheme.
    pub(super) fn choose(scheme: &str) -> Result<Self, Error> {
        let lookup = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        match scheme {
            "s3" | "s3a" => choose_aws(&lookup),
            "gs" => Ok(Self::Environment(describe_google(&lookup))),
            _ => Ok(Self::Environment(describe_azure(&lookup))),
        }
    }

    /// A provider to sign with, where it is ours.
    pub(super) fn shared_file(&self) -> Option<Arc<SharedFile>> {
        match self {
            Self::SharedFile(file) => Some(file.clone()),
            _ => None,
        }
    }

    /// How often they were renewed by us.
    pub(super) fn generation(&self) -> u64 {
        self.shared_file().map_or(0, |file| file.state.lock().generation)
    }

    /// Reads again what can be read again, because a store did not accept what there was.
    pub(super) fn renew(&self) {
        if let Some(file) = self.shared_file() {
            file.read_if_changed(true);
        }
    }

    /// When they expire, in seconds since 1970, where that is known.
    pub(super) fn expire_unix(&self) -> Option<i64> {
        let text = self.shared_file()?.state.lock().keys.expires.clone()?;
        let at = chrono::DateTime::parse_from_rfc3339(&text).ok()?;
        Some(at.timestamp())
    }

    /// Where they come from, for people.
    pub(super) fn describe(&self) -> String {
        match self {
            Self::None => "none".into(),
            Self::SharedFile(file) => file.describe(),
            Self::Environment(described) => described.clone(),
        }
    }
}

/// As the SDKs do: keys in the environment, then the file, then roles.
fn choose_aws(lookup: Lookup<'_>) -> Result<Credentials, Error> {
    if let Some(described) = describe_aws_keys(lookup) {
        return Ok(Credentials::Environment(described));
    }
    let named_file = lookup("AWS_SHARED_CREDENTIALS_FILE");
    let named_profile = lookup("AWS_PROFILE");
    let usual = || lookup("HOME").map(|home| format!("{home}/.aws/credentials"));
    if let Some(path) = named_file.clone().or_else(usual) {
        let profile = named_profile.clone().unwrap_or_else(|| "default".into());
        match SharedFile::open(path.into(), profile) {
            Ok(file) => return Ok(Credentials::SharedFile(Arc::new(file))),
            Err(error) if named_file.is_some() || named_profile.is_some() => return Err(error),
            // Nobody asked for this file.
            Err(_) => {}
        }
    }
    Ok(Credentials::Environment(describe_aws_role(lookup)))
}

fn describe_aws_keys(lookup: Lookup<'_>) -> Option<String> {
    if lookup("AWS_SKIP_SIGNATURE").is_some_and(|value| value == "true") {
        return Some("none (AWS_SKIP_SIGNATURE)".into());
    }
    let key_id = lookup("AWS_ACCESS_KEY_ID")?;
    Some(format!("AWS_ACCESS_KEY_ID {}, read at start", tail(&key_id)))
}

fn describe_aws_role(lookup: Lookup<'_>) -> String {
    if let (Some(file), Some(role)) =
        (lookup("AWS_WEB_IDENTITY_TOKEN_FILE"), lookup("AWS_ROLE_ARN"))
    {
        return format!("web identity token {file} for {role}, renewed");
    }
    match lookup("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI")
        .or_else(|| lookup("AWS_CONTAINER_CREDENTIALS_FULL_URI"))
    {
        Some(uri) => format!("container role at {uri}, renewed"),
        None => "instance role, renewed; no keys are set and no credentials file was found".into(),
    }
}

fn describe_google(lookup: Lookup<'_>) -> String {
    let files = ["GOOGLE_SERVICE_ACCOUNT", "GOOGLE_SERVICE_ACCOUNT_PATH", "SERVICE_ACCOUNT"];
    for variable in files.into_iter().chain(["GOOGLE_APPLICATION_CREDENTIALS"]) {
        if let Some(path) = lookup(variable) {
            return format!("{variable} {path}, its tokens are renewed");
        }
    }
    for variable in ["GOOGLE_SERVICE_ACCOUNT_KEY", "GOOGLE_BEARER_TOKEN"] {
        if lookup(variable).is_some() {
            return format!("{variable}, read at start");
        }
    }
    "application default credentials or the instance's service account, renewed".into()
}

fn describe_azure(lookup: Lookup<'_>) -> String {
    if lookup("AZURE_STORAGE_USE_EMULATOR").is_some_and(|value| value == "true") {
        return "the emulator's key".into();
    }
    let fixed = [
        "AZURE_STORAGE_TOKEN",
        "AZURE_STORAGE_ACCOUNT_KEY",
        "AZURE_STORAGE_ACCESS_KEY",
        "AZURE_STORAGE_SAS_TOKEN",
        "AZURE_STORAGE_SAS_KEY",
    ];
    if let Some(variable) = fixed.into_iter().find(|variable| lookup(variable).is_some()) {
        return format!("{variable}, read at start");
    }
    if let Some(file) = lookup("AZURE_FEDERATED_TOKEN_FILE") {
        return format!("federated token {file}, renewed");
    }
    match lookup("AZURE_CLIENT_SECRET").or_else(|| lookup("AZURE_STORAGE_CLIENT_SECRET")) {
        Some(_) => "AZURE_CLIENT_SECRET, its tokens are renewed".into(),
        None => "managed identity, renewed".into(),
    }
}

/// Enough of a key id to tell two apart.
fn tail(key_id: &str) -> String {
    let count = key_id.chars().count();
    format!("...{}", key_id.chars().skip(count.saturating_sub(4)).collect::<String>())
}

/// A profile of a shared credentials file.
#[derive(Debug)]
pub(super) struct SharedFile {
    path: PathBuf,
    profile: String,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    keys: Keys,
    /// How often other keys were read.
    generation: u64,
    stamp: Stamp,
    looked_at: Instant,
    /// The file was changed and cannot be used: said once.
    complained: bool,
}

/// What a profile holds.
#[derive(Clone, Debug)]
struct Keys {
    credential: Arc<AwsCredential>,
    /// As written by whoever renews the file; there is no standard for it.
    expires: Option<String>,
}

/// What changes when a file is written or replaced: device, inode, length, modification and change time.
type Stamp = [i64; 7];

impl SharedFile {
    fn open(path: PathBuf, profile: String) -> Result<Self, Error> {
        let (stamp, keys) = read(&path, &profile).map_err(|error| {
            let text = format!("{error} (AWS_SHARED_CREDENTIALS_FILE, AWS_PROFILE)");
            Error::invalid(path.display(), text)
        })?;
        let state =
            State { keys, generation: 0, stamp, looked_at: Instant::now(), complained: false };
        Ok(Self { path, profile, state: Mutex::new(state) })
    }

    fn describe(&self) -> String {
        let state = self.state.lock();
        let (path, profile) = (self.path.display(), &self.profile);
        let key = tail(&state.keys.credential.key_id);
        let expires = state.keys.expires.as_ref().map(|at| format!(", expires {at}"));
        let expires = expires.unwrap_or_default();
        format!("{path}, profile {profile}, key {key}{expires}, read again when it changes")
    }

    /// Reads the file if it is another than before; whether its keys are. Looks now and then, or `now`.
    fn read_if_changed(&self, now: bool) -> bool {
        let mut state = self.state.lock();
        if !now && state.looked_at.elapsed() < LOOK_EVERY {
            return false;
        }
        state.looked_at = Instant::now();
        if stamp(&self.path).is_ok_and(|stamp| stamp == state.stamp) {
            return false;
        }
        let path = self.path.display();
        match read(&self.path, &self.profile) {
            Ok((stamp, keys)) => {
                let changed = keys.credential != state.keys.credential;
                (state.stamp, state.keys, state.complained) = (stamp, keys, false);
                if changed {
                    state.generation += 1;
                    let key = tail(&state.keys.credential.key_id);
                    tracing::info!("{path}: new credentials, key {key}");
                }
                changed
            }
            // Perhaps it is being written: the keys that there are go on, and the next look tells more.
            Err(error) => {
                if !std::mem::replace(&mut state.complained, true) {
                    tracing::warn!("{path}: {error}; the credentials read before are used on");
                }
                false
            }
        }
    }
}

#[async_trait]
impl CredentialProvider for SharedFile {
    type Credential = AwsCredential;

    async fn get_credential(&self) -> object_store::Result<Arc<AwsCredential>> {
        self.read_if_changed(false);
        Ok(self.state.lock().keys.credential.clone())
    }
}

fn stamp(path: &Path) -> std::io::Result<Stamp> {
    Ok(stamp_of(&std::fs::metadata(path)?))
}

fn stamp_of(meta: &std::fs::Metadata) -> Stamp {
    let signed = |number: u64| i64::from_ne_bytes(number.to_ne_bytes());
    [
        signed(meta.dev()),
        signed(meta.ino()),
        signed(meta.len()),
        meta.mtime(),
        meta.mtime_nsec(),
        meta.ctime(),
        meta.ctime_nsec(),
    ]
}

fn read(path: &Path, profile: &str) -> Result<(Stamp, Keys), String> {
    let failed = |error: std::io::Error| error.to_string();
    let file = std::fs::File::open(path).map_err(failed)?;
    let stamp = stamp_of(&file.metadata().map_err(failed)?);
    let mut text = String::new();
    file.take(MAX_FILE_BYTES).read_to_string(&mut text).map_err(failed)?;
    Ok((stamp, parse(&text, profile)?))
}

/// The keys of `[profile]`.
fn parse(text: &str, profile: &str) -> Result<Keys, String> {
    let mut inside = false;
    let (mut key_id, mut secret_key, mut token, mut expires) = (None, None, None, None);
    for line in text.lines().map(str::trim) {
        if line.starts_with(['#', ';']) {
            continue;
        }
        if let Some(section) = line.strip_prefix('[').and_then(|rest| rest.split(']').next()) {
            inside = section.trim() == profile;
            continue;
        }
        let Some((name, value)) = line.split_once('=').filter(|_| inside) else { continue };
        let value = Some(value.trim().to_owned()).filter(|value| !value.is_empty());
        match name.trim() {
            "aws_access_key_id" => key_id = value,
            "aws_secret_access_key" => secret_key = value,
            "aws_session_token" => token = value,
            "x_security_token_expires" | "aws_expiration" | "expiration" => expires = value,
            _ => {}
        }
    }
    match (key_id, secret_key) {
        (Some(key_id), Some(secret_key)) => {
            let credential = Arc::new(AwsCredential { key_id, secret_key, token });
            Ok(Keys { credential, expires })
        }
        _ => Err(format!("has no access key and secret for profile {profile:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "# by hand\n[default]\naws_access_key_id = ONE\naws_secret_access_key=secret=1\n\
        \n[ ci ]\naws_access_key_id=TWO\naws_secret_access_key = two\naws_session_token = token\n\
        x_security_token_expires = 2026-01-01T00:00:00Z\n[empty]\nrole_arn = x\n";

    #[test]
    fn profiles_are_told_apart() {
        let default = parse(FILE, "default").expect("is there");
        assert_eq!(default.credential.key_id, "ONE");
        assert_eq!(default.credential.secret_key, "secret=1");
        assert_eq!((&default.credential.token, &default.expires), (&None, &None));
        let ci = parse(FILE, "ci").expect("is there");
        assert_eq!(ci.credential.token.as_deref(), Some("token"));
        assert!(ci.expires.expect("written").starts_with("2026"));
        for missing in ["empty", "other", ""] {
            assert!(parse(FILE, missing).expect_err("no keys").contains(missing));
        }
    }

    fn write(path: &Path, key: &str) {
        let text = format!("[default]\naws_access_key_id={key}\naws_secret_access_key=s\n");
        // As tools do it: another file takes the place.
        let other = path.with_extension("new");
        std::fs::write(&other, text).expect("written");
        std::fs::rename(&other, path).expect("renamed");
    }

    #[test]
    fn a_changed_file_is_read_again_and_a_broken_one_is_not_used() {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("credentials");
        write(&path, "KEY-ONE");
        let file = SharedFile::open(path.clone(), "default".into()).expect("opens");
        assert!(!file.read_if_changed(true), "nothing changed");
        write(&path, "KEY-TWO");
        assert!(!file.read_if_changed(false), "it was looked at a moment ago");
        assert!(file.read_if_changed(true));
        assert!(file.describe().contains("...-TWO"), "{}", file.describe());
        std::fs::write(&path, "[default]\naws_access_key_id=KEY-THREE\n").expect("written");
        assert!(!file.read_if_changed(true), "half a file");
        assert!(file.describe().contains("...-TWO"));
        write(&path, "KEY-FOUR");
        assert!(file.read_if_changed(true));
    }

    #[test]
    fn sources_are_chosen_as_the_sdks_do() {
        let directory = tempfile::tempdir().expect("directory");
        let aws = directory.path().join(".aws");
        std::fs::create_dir(&aws).expect("made");
        let home = directory.path().display().to_string();
        let choose = |set: &[(&str, &str)]| {
            let lookup = |name: &str| {
                let all = set.iter().copied().chain([("HOME", home.as_str())]);
                all.into_iter().find(|(key, _)| *key == name).map(|(_, value)| value.to_owned())
            };
            choose_aws(&lookup).map(|chosen| chosen.describe())
        };
        let role = choose(&[]).expect("a role");
        assert!(role.starts_with("instance role"), "{role}");
        let web = [("AWS_WEB_IDENTITY_TOKEN_FILE", "/token"), ("AWS_ROLE_ARN", "arn")];
        assert!(choose(&web).expect("a token").contains("web identity token /token"));
        assert!(choose(&[("AWS_PROFILE", "ci")]).is_err(), "there is no file with that profile");
        write(&aws.join("credentials"), "KEY-FILE");
        assert!(choose(&web).expect("the file").contains("...FILE"), "the file goes first");
        assert!(
            choose(&[("AWS_PROFILE", "ci")]).expect_err("no profile").to_string().contains("ci")
        );
        let keys = choose(&[("AWS_ACCESS_KEY_ID", "KEY-SET"), ("AWS_PROFILE", "ci")]);
        assert!(keys.expect("keys").contains("...-SET"), "keys in the environment go first");
    }
}
