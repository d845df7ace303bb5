//! Makes the fuzz targets' corpus from the objects of a store:
//!
//! ```text
//! cargo run --release -p reap-fuzz --features corpus --bin corpus -- tests/data/v1/store fuzz/corpus
//! ```
#![allow(clippy::print_stderr, reason = "a program for developers")]

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

use reap_store::format::pack::{self, TRAILER_BYTES};
use reap_store::format::working_set::{self, PRELUDE_BYTES};

/// Longer seeds only slow a fuzzer down.
const LONGEST_SEED_BYTES: usize = 4096;
const HANDSHAKE: &str = r#"[{"base_host_virt_addr":4194304,"size":2097152,"offset":0,"page_size":4096},
{"base_host_virt_addr":8388608,"size":2097152,"offset":2097152,"page_size_kib":4096,"more":{"a":["]"]}}]"#;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args_os().skip(1).map(PathBuf::from);
    let (Some(store), Some(corpus)) = (arguments.next(), arguments.next()) else {
        return Err("usage: corpus STORE-DIRECTORY CORPUS-DIRECTORY".into());
    };
    let mut seeds = Seeds { corpus, count: 0 };
    let mut keys = Vec::new();
    for path in files(&store)? {
        let key = path.strip_prefix(&store)?.display().to_string();
        add(&mut seeds, &key, &fs::read(&path)?)?;
        seeds.add("names", key.rsplit('/').next().unwrap_or_default().as_bytes())?;
        keys.push(key);
    }
    seeds.add("names", b"resnet:v3")?;
    seeds.add("listings", keys.join("\n").as_bytes())?;
    seeds.add("handshake", HANDSHAKE.as_bytes())?;
    seeds.add("trace", b"# page us\n7 10\n3 11\n8\n\n4\n")?;
    seeds.add("size", b"20GiB")?;
    seeds.add("page_table", &page_table())?;
    eprintln!("{} seeds in {}", seeds.count, seeds.corpus.display());
    Ok(())
}

struct Seeds {
    corpus: PathBuf,
    count: u32,
}

impl Seeds {
    fn add(&mut self, target: &str, bytes: &[u8]) -> Result<(), Box<dyn Error>> {
        if bytes.len() > LONGEST_SEED_BYTES {
            return Ok(());
        }
        let directory = self.corpus.join(target);
        fs::create_dir_all(&directory)?;
        let name = reap_store::Hash::of(bytes).to_string();
        fs::write(directory.join(&name[..16]), bytes)?;
        self.count += 1;
        Ok(())
    }
}

fn files(directory: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        match path.is_dir() {
            true => found.extend(files(&path)?),
            false => found.push(path),
        }
    }
    found.sort();
    Ok(found)
}

fn add(seeds: &mut Seeds, key: &str, object: &[u8]) -> Result<(), Box<dyn Error>> {
    match key.split('/').next().unwrap_or_default() {
        "format" => seeds.add("records", &[&[0], sealed(object)?].concat()),
        "snap" => seeds.add("records", &[&[1], sealed(object)?].concat()),
        "ref" => seeds.add("records", &[&[2], sealed(object)?].concat()),
        "gc" => seeds.add("records", &[&[4], sealed(object)?].concat()),
        "manifest" => {
            let body = zstd::bulk::decompress(&object[16..], 1 << 20)?;
            seeds.add("manifest", object)?;
            seeds.add("manifest_body", &body)
        }
        "pack" => {
            let end = object.len() - TRAILER_BYTES;
            let footer = pack::footer_range(&object[end..], object.len() as u64);
            let footer = footer.map_err(|why| why.to_string())?;
            let footer = usize::try_from(footer.start)?;
            seeds.add("footer", &object[footer..end])?;
            let first = footer + 8;
            let stored = usize::try_from(u32::from_le_bytes(
                *object[first + 8..].first_chunk().ok_or("short")?,
            ))?;
            let frame = &object[pack::HEADER_BYTES..pack::HEADER_BYTES + stored];
            seeds.add("frame", &[&[0], &object[first..first + 48], frame].concat())?;
            seeds.add("frame", &[&[1], frame].concat())
        }
        "ws" => {
            let end = working_set::header_end(object).map_err(|why| why.to_string())?;
            let body = &object[PRELUDE_BYTES..usize::try_from(end)?];
            let length = (object.len() as u64).to_le_bytes();
            seeds.add("working_set", &[&object[7..8], &length, body].concat())
        }
        _ => Ok(()),
    }
}

/// The JSON of a sealed record.
fn sealed(object: &[u8]) -> Result<&[u8], Box<dyn Error>> {
    Ok(&object[..object.len().checked_sub(66).ok_or("a short record")?])
}

/// A page table of three pages, after the page id that is looked for.
fn page_table() -> Vec<u8> {
    let mut table = 2u64.to_be_bytes().to_vec();
    table.extend_from_slice(b"REAPIDX\x01");
    table.extend_from_slice(&[7; 16]);
    table.extend_from_slice(&3u64.to_le_bytes());
    for prefix in [1u64, 2, 2] {
        table.extend_from_slice(&prefix.to_be_bytes());
        table.extend_from_slice(&[0, 0, 0, 0, 1, 0, 0, 0]);
    }
    table
}
