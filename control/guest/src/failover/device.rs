//! A device as QEMU's `-device` option writes it: `vfio-pci,host=0000:01:10.0,id=vf0`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::GuestError;

/// Options for `device_add`, in the order in which they were given.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceOptions(Vec<(String, String)>);

impl DeviceOptions {
    /// A device of this driver, with this id.
    #[must_use]
    pub fn new(driver: &str, id: &str) -> DeviceOptions {
        DeviceOptions(vec![("driver".into(), driver.into()), ("id".into(), id.into())])
    }

    /// The same, with one more option; one that was there is replaced.
    #[must_use]
    pub fn with(mut self, key: &str, value: &str) -> DeviceOptions {
        match self.0.iter_mut().find(|(known, _)| known == key) {
            Some((_, old)) => value.clone_into(old),
            None => self.0.push((key.into(), value.into())),
        }
        self
    }

    /// The same without an option.
    #[must_use]
    pub fn without(mut self, key: &str) -> DeviceOptions {
        self.0.retain(|(known, _)| known != key);
        self
    }

    /// An option's value.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&str> {
        self.0.iter().find(|(known, _)| known == key).map(|(_, value)| value.as_str())
    }

    /// Its id; the empty text where none was given.
    #[must_use]
    pub fn id(&self) -> &str {
        self.get("id").unwrap_or_default()
    }

    /// Its driver; the empty text where none was given.
    #[must_use]
    pub fn driver(&self) -> &str {
        self.get("driver").unwrap_or_default()
    }

    /// The arguments of QMP's `device_add`, which takes no text for a number or a switch: `kind` says which of QEMU's
    /// types an option has. One that it does not know, or whose value does not fit, goes as text, for QEMU to judge.
    pub fn arguments(&self, kind: impl Fn(&str) -> Option<String>) -> Value {
        let typed = |(key, value): &(String, String)| (key.clone(), typed(kind(key).as_deref(), value));
        Value::Object(self.0.iter().map(typed).collect::<Map<_, _>>())
    }
}

fn typed(kind: Option<&str>, value: &str) -> Value {
    let fitting = match (kind, value) {
        (Some("bool"), "on" | "true" | "yes") => Some(true.into()),
        (Some("bool"), "off" | "false" | "no") => Some(false.into()),
        (Some(kind), _) if kind.starts_with("int") => value.parse::<i64>().ok().map(Value::from),
        (Some(kind), _) if kind.starts_with("uint") || kind == "size" => unsigned(value).map(Value::from),
        (Some(_) | None, _) => None,
    };
    fitting.unwrap_or_else(|| value.into())
}

fn unsigned(value: &str) -> Option<u64> {
    value.strip_prefix("0x").map_or_else(|| value.parse().ok(), |digits| u64::from_str_radix(digits, 16).ok())
}

impl FromStr for DeviceOptions {
    type Err = GuestError;

    fn from_str(text: &str) -> Result<DeviceOptions, GuestError> {
        let wrong = |what: &str| {
            GuestError::mistake(format!(
                "`{text}` names no device: {what}; write it as for QEMU's -device, e.g. vfio-pci,host=0000:01:10.0,id=vf0"
            ))
        };
        let mut options = DeviceOptions(Vec::new());
        for (at, word) in words(text).iter().enumerate() {
            let (key, value) = match word.split_once('=') {
                Some(pair) => pair,
                None if at == 0 => ("driver", word.as_str()),
                None => return Err(wrong(&format!("`{word}` has no value"))),
            };
            if key.is_empty() || value.is_empty() {
                return Err(wrong(&format!("`{word}` is half of an option")));
            }
            options = options.with(key, value);
        }
        if options.id().is_empty() {
            return Err(wrong("it has no id"));
        }
        Ok(options)
    }
}

/// At single commas; a double one is a comma, as in QEMU.
fn words(text: &str) -> Vec<String> {
    let mark = "\u{0}";
    text.replace(",,", mark).split(',').map(|word| word.replace(mark, ",")).collect()
}

impl fmt::Display for DeviceOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let escape = |text: &str| text.replace(',', ",,");
        f.write_str(&escape(self.driver()))?;
        let others = self.0.iter().filter(|(key, _)| key != "driver");
        others.into_iter().try_for_each(|(key, value)| write!(f, ",{key}={}", escape(value)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_read_back_what_they_print() {
        for text in ["vfio-pci,host=0000:01:10.0,id=vf0", "e1000e,id=p,netdev=a,,b,bus=rp1", ",id=p"] {
            let Ok(options) = text.parse::<DeviceOptions>() else {
                assert_eq!(text, ",id=p");
                continue;
            };
            assert_eq!(options.to_string(), text);
        }
    }

    #[test]
    fn an_option_is_given_once_and_taken_away() {
        let options: DeviceOptions = "driver=vfio-pci,id=vf0,host=a".parse().unwrap();
        let options = options.with("host", "b").with("bus", "rp1").without("id");
        assert_eq!(
            options.arguments(|_| None),
            serde_json::json!({ "driver": "vfio-pci", "host": "b", "bus": "rp1" })
        );
    }

    #[test]
    fn what_is_no_device_is_refused_with_an_example() {
        for text in ["", "vfio-pci", "vfio-pci,id=", "vfio-pci,host,id=a"] {
            let sentence = text.parse::<DeviceOptions>().unwrap_err().to_string();
            assert!(sentence.contains("-device, e.g. vfio-pci"), "{text}: {sentence}");
        }
    }
}
