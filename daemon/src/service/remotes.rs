//! Where images come from: this daemon's image hosts, and the mirror that a setting names.

use pileus_base::{Code, Error, Layout, Result};
use pileus_images::StoreConfig;
use pileus_images::hosts::simplestreams::{Mirror, StreamsConfig};

/// The store's configuration with all hosts. `address` is where images with Ubuntu's names are; with
/// an empty one there are none.
pub(crate) fn store_config(address: &str, layout: &Layout) -> Result<(StoreConfig, Mirror)> {
    let mut config = StoreConfig::new(layout.images());
    if address.is_empty() {
        return Ok((config, Mirror::default()));
    }
    let url = address.parse().map_err(|err| {
        Error::new(
            Code::InvalidArgument,
            format!("The image host {address} is no address: {err}"),
        )
        .advise("Give it as https://HOST/PATH/, or an empty text for none.")
    })?;
    let streams = StreamsConfig::new(url, layout.cache.join("image-hosts"));
    let mirror = streams.mirror.clone();
    config.hosts.extend(streams.hosts()?);
    Ok((config, mirror))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_decides_which_names_there_are() {
        let layout = Layout::below(std::path::Path::new("/nowhere"), 0);
        let names = |address: &str| -> Result<Vec<String>> {
            let (config, _) = store_config(address, &layout)?;
            let names = config.hosts.iter().map(|host| host.name().to_owned());
            Ok(names.collect())
        };
        assert_eq!(names("").unwrap(), ["file", "http", "build"]);
        let all = names("http://127.0.0.1:9/x").unwrap();
        assert_eq!(all[3..], ["release", "daily", "snapcraft"]);
        assert_eq!(names("x").unwrap_err().code, Code::InvalidArgument);
    }
}
