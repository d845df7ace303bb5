//! The rules of the handshake: what a VMM sends, and what of it we accept. No I/O.
//!
//! The message is a JSON array of regions as Firecracker sends it, with the userfaultfd as
//! ancillary data. Every rule that it can break has a variant of [`Broken`] with its own words.

use serde::Deserialize;

use crate::layout::{Layout, PageSize, Region};

/// Longest message. A region takes some 150 bytes, so 64 of them take 10 KiB.
pub(crate) const MAX_MESSAGE_BYTES: usize = 64 << 10;
/// Most regions of a VM.
pub(crate) const MAX_REGIONS: usize = 64;
/// The page size of VMMs that do not state one (Firecracker 1.1 to 1.6).
const DEFAULT_PAGE_BYTES: u64 = 4096;

/// The rule that a handshake breaks.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum Broken {
    /// The text cannot become what we expect.
    #[error("the message is not a JSON array of regions: {0}")]
    NotRegions(String),
    /// Too long.
    #[error("the message is longer than {MAX_MESSAGE_BYTES} bytes")]
    TooLong,
    /// The peer closed the connection before it had sent everything.
    #[error("the peer hung up before the handshake was complete")]
    HungUp,
    /// Time is over.
    #[error("the handshake was not complete in time: {0}")]
    TooSlow(&'static str),
    /// Region count.
    #[error("{0} regions; 1 to {MAX_REGIONS} are accepted")]
    RegionCount(usize),
    /// Page size.
    #[error("page size {0} is neither 4096 nor 2097152 bytes")]
    PageSize(u64),
    /// Different page sizes.
    #[error("regions of different page sizes: {0} and {1} bytes")]
    MixedPageSizes(u64, u64),
    /// Alignment.
    #[error("region {region}: {field} {value:#x} is not a multiple of the page size {page_bytes}")]
    Unaligned {
        /// Position in the message.
        region: usize,
        /// Which field.
        field: &'static str,
        /// Its value.
        value: u64,
        /// The page size.
        page_bytes: u64,
    },
    /// A region without pages.
    #[error("region {0} is empty")]
    Empty(usize),
    /// Sums that do not fit.
    #[error("region {0}: the end of its addresses or file offsets does not fit in 64 bits")]
    Overflow(usize),
    /// Overlap in guest memory.
    #[error("two regions overlap at address {0:#x}")]
    AddressOverlap(u64),
    /// Overlap in the file.
    #[error("two regions overlap at memory file offset {0:#x}")]
    OffsetOverlap(u64),
    /// A region that the snapshot does not have.
    #[error("region {region} ends at memory file offset {end:#x}, the file at {file_end:#x}")]
    BeyondFile {
        /// Position in the message.
        region: usize,
        /// Its end in the file.
        end: u64,
        /// The end of the file, rounded up to a page.
        file_end: u64,
    },
    /// Descriptors.
    #[error("{0} file descriptors came with the message; exactly one is accepted")]
    DescriptorCount(usize),
    /// Not a userfaultfd.
    #[error("the file descriptor is {0:?}, not a userfaultfd")]
    NotUserfaultfd(String),
    /// No UFFDIO_API so far.
    #[error("the userfaultfd is not initialised")]
    Uninitialised,
    /// Somebody else.
    #[error("the peer runs as uid {actual}, not {expected}")]
    PeerUid {
        /// What it is.
        actual: u32,
        /// What was configured.
        expected: u32,
    },
    /// Too many VMs.
    #[error("{0} VMs are being served, which is the configured maximum")]
    TooManyVms(usize),
    /// The system did not play along.
    #[error("{0}")]
    System(String),
}

/// A region as it is written in the message.
#[derive(Deserialize)]
struct Written {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    page_size: Option<u64>,
    /// Bytes too, despite its name: Firecracker named it so in 1.7.
    page_size_kib: Option<u64>,
}

impl Written {
    fn page_bytes(&self) -> u64 {
        self.page_size.or(self.page_size_kib).unwrap_or(DEFAULT_PAGE_BYTES)
    }
}

/// The memory that a complete message describes; `Ok(None)` if more bytes are needed. Bytes after
/// the array are ignored.
pub(crate) fn parse(message: &[u8], memory_file_bytes: u64) -> Result<Option<Layout>, Broken> {
    match message.iter().find(|byte| !byte.is_ascii_whitespace()) {
        Some(b'[') => {}
        Some(_) => return Err(Broken::NotRegions("it does not begin with `[`".into())),
        None if message.len() > MAX_MESSAGE_BYTES => return Err(Broken::TooLong),
        None => return Ok(None),
    }
    let within = &message[..message.len().min(MAX_MESSAGE_BYTES)];
    let mut values = serde_json::Deserializer::from_slice(within).into_iter::<Vec<Written>>();
    match values.next() {
        Some(Ok(regions)) => layout(&regions, memory_file_bytes).map(Some),
        Some(Err(error)) if !error.is_eof() => Err(Broken::NotRegions(error.to_string())),
        _ if message.len() > MAX_MESSAGE_BYTES => Err(Broken::TooLong),
        _ => Ok(None),
    }
}

fn layout(written: &[Written], memory_file_bytes: u64) -> Result<Layout, Broken> {
    if written.is_empty() || written.len() > MAX_REGIONS {
        return Err(Broken::RegionCount(written.len()));
    }
    let page_size = page_size(written)?;
    let file_end = memory_file_bytes.next_multiple_of(page_size.bytes());
    let mut regions = Vec::with_capacity(written.len());
    for (position, region) in written.iter().enumerate() {
        check_alignment(position, region, page_size.bytes())?;
        region.base_host_virt_addr.checked_add(region.size).ok_or(Broken::Overflow(position))?;
        let end = region.offset.checked_add(region.size).ok_or(Broken::Overflow(position))?;
        if end > file_end {
            return Err(Broken::BeyondFile { region: position, end, file_end });
        }
        regions.push(Region {
            address: region.base_host_virt_addr,
            bytes: region.size,
            file_offset: region.offset,
        });
    }
    let addresses = regions.iter().map(|region| (region.address, region.bytes)).collect();
    overlap(addresses).map_or(Ok(()), |at| Err(Broken::AddressOverlap(at)))?;
    let offsets = regions.iter().map(|region| (region.file_offset, region.bytes)).collect();
    overlap(offsets).map_or(Ok(()), |at| Err(Broken::OffsetOverlap(at)))?;
    Ok(Layout::new(page_size, regions))
}

fn page_size(written: &[Written]) -> Result<PageSize, Broken> {
    let bytes = written[0].page_bytes();
    if let Some(other) = written.iter().find(|region| region.page_bytes() != bytes) {
        return Err(Broken::MixedPageSizes(bytes, other.page_bytes()));
    }
    [PageSize::Base, PageSize::Huge]
        .into_iter()
        .find(|size| size.bytes() == bytes)
        .ok_or(Broken::PageSize(bytes))
}

fn check_alignment(region: usize, written: &Written, page_bytes: u64) -> Result<(), Broken> {
    let fields = [
        ("base_host_virt_addr", written.base_host_virt_addr),
        ("size", written.size),
        ("offset", written.offset),
    ];
    for (field, value) in fields {
        if value % page_bytes != 0 {
            return Err(Broken::Unaligned { region, field, value, page_bytes });
        }
    }
    if written.size == 0 { Err(Broken::Empty(region)) } else { Ok(()) }
}

/// Where two of the (start, length) ranges overlap first.
fn overlap(mut ranges: Vec<(u64, u64)>) -> Option<u64> {
    ranges.sort_unstable();
    ranges.windows(2).find(|pair| pair[0].0 + pair[0].1 > pair[1].0).map(|pair| pair[1].0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn region(address: u64, size: u64, offset: u64) -> String {
        format!(
            r#"{{"base_host_virt_addr":{address},"size":{size},"offset":{offset},
                "page_size":4096,"page_size_kib":4096,"new_field":[{{}}]}}"#
        )
    }

    fn broken(message: &str) -> Broken {
        match parse(message.as_bytes(), 64 * MIB) {
            Err(broken) => broken,
            Ok(_) => panic!("accepted: {message}"),
        }
    }

    fn page_size_of(fields: &str) -> Result<PageSize, Broken> {
        let message = format!(
            r#"[{{"base_host_virt_addr":{},"size":{},"offset":0{fields}}}]"#,
            2 * MIB,
            2 * MIB
        );
        parse(message.as_bytes(), 64 * MIB)
            .map(|layout| layout.expect("the message is complete").page_size())
    }

    #[test]
    fn page_size_kib_is_bytes() {
        assert_eq!(page_size_of(r#","page_size_kib":4096"#), Ok(PageSize::Base));
        assert_eq!(page_size_of(r#","page_size_kib":2097152"#), Ok(PageSize::Huge));
        assert_eq!(page_size_of(r#","page_size_kib":4"#), Err(Broken::PageSize(4)));
        assert_eq!(page_size_of(r#","page_size":2097152,"page_size_kib":4"#), Ok(PageSize::Huge));
        assert_eq!(page_size_of(""), Ok(PageSize::Base));
        assert_eq!(page_size_of(r#","page_size":1073741824"#), Err(Broken::PageSize(1 << 30)));
    }

    #[test]
    fn every_prefix_of_a_long_message_needs_more() {
        let regions: Vec<_> =
            (0..16).map(|at| region((1000 + 2 * at) * MIB, MIB, at * MIB)).collect();
        let message = format!(" [{}]", regions.join(","));
        assert!(message.len() > 1024);
        for end in 0..message.len() {
            assert!(matches!(parse(&message.as_bytes()[..end], 64 * MIB), Ok(None)), "{end}");
        }
        let layout = parse(message.as_bytes(), 64 * MIB).unwrap().unwrap();
        assert_eq!(layout.page_count(), 16 * 256);
        let trailed = format!("{message}{message}");
        assert!(parse(trailed.as_bytes(), 64 * MIB).unwrap().is_some());
    }

    #[test]
    fn each_rule_has_its_own_message() {
        assert!(matches!(broken("hello"), Broken::NotRegions(_)));
        assert!(matches!(broken("[}"), Broken::NotRegions(_)));
        assert!(matches!(broken(r#"[{"size":4096}]"#), Broken::NotRegions(_)));
        assert!(matches!(broken(r#"[{"base_host_virt_addr":-1}]"#), Broken::NotRegions(_)));
        assert_eq!(broken("[]"), Broken::RegionCount(0));
        let many: Vec<_> = (0..65).map(|at| region(at * MIB, 4096, at * 4096)).collect();
        assert_eq!(broken(&format!("[{}]", many.join(","))), Broken::RegionCount(65));
        let one = |address, size, offset| broken(&format!("[{}]", region(address, size, offset)));
        assert!(matches!(one(1, MIB, 0), Broken::Unaligned { field: "base_host_virt_addr", .. }));
        assert!(matches!(one(MIB, 5000, 0), Broken::Unaligned { field: "size", .. }));
        assert!(matches!(one(MIB, MIB, 512), Broken::Unaligned { field: "offset", .. }));
        assert_eq!(one(MIB, 0, 0), Broken::Empty(0));
        assert_eq!(one(u64::MAX - 4095, MIB, 0), Broken::Overflow(0));
        assert_eq!(one(MIB, MIB, u64::MAX - 4095), Broken::Overflow(0));
        assert!(matches!(one(MIB, 65 * MIB, 0), Broken::BeyondFile { .. }));
        let two = |a, b| broken(&format!("[{a},{b}]"));
        assert_eq!(
            two(region(MIB, MIB, 0), region(MIB + 4096, MIB, MIB)),
            Broken::AddressOverlap(MIB + 4096)
        );
        assert_eq!(two(region(MIB, MIB, 0), region(4 * MIB, MIB, 0)), Broken::OffsetOverlap(0));
        let long = format!("[{}", " ".repeat(MAX_MESSAGE_BYTES + 1));
        assert_eq!(broken(&long), Broken::TooLong);
    }

    #[test]
    fn mixed_page_sizes_are_refused() {
        let huge = region(4 * MIB, 2 * MIB, 2 * MIB)
            .replace("\"page_size\":4096", "\"page_size\":2097152");
        let message = format!("[{},{huge}]", region(MIB, MIB, 0));
        assert_eq!(broken(&message), Broken::MixedPageSizes(4096, 2 << 20));
    }

    #[test]
    fn last_page_of_an_odd_file_belongs_to_it() {
        let message = format!("[{}]", region(MIB, 8192, 0));
        assert!(parse(message.as_bytes(), 4097).unwrap().is_some());
        assert!(parse(message.as_bytes(), 4096).is_err());
    }
}
