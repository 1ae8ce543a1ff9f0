//! The folders of the templates: what is there, and how it comes and goes. The folders are the truth;
//! this only remembers them. `ID/template.json`, written last, makes a template; folders without one,
//! or whose name begins with a dot, are half made or half gone and are swept at the start.
//!
//! A template's disk is a layer as any other (`data/layers/`): it outlives the template as long as
//! instances stand on it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pileus_api::{TemplateState, Timestamp};
use pileus_base::{Code, Error, Layout, Result, ResultExt, Size, files};
use pileus_instances::qemu::loan;
use pileus_instances::template::{Folder, Manifest, TemplateKey};
use uuid::Uuid;

use super::not_found;
use crate::state::demand::Shape;
use crate::state::instances::Layer;

const USED: &str = "used";

/// A template. As long as someone holds its `Arc`, its files stay.
#[derive(Debug)]
pub struct Template {
    pub id: String,
    pub state: TemplateState,
    pub key: TemplateKey,
    pub folder: Folder,
    pub layer: Layer,
    pub created_at: Timestamp,
    pub in_memory: bool,
}

impl Template {
    fn shape_of(key: &TemplateKey) -> Shape {
        Shape {
            image: key.image.clone(),
            cpus: key.cpus,
            memory: key.memory,
        }
    }

    pub fn shape(&self) -> Shape {
        Self::shape_of(&self.key)
    }

    pub fn disk(&self) -> PathBuf {
        self.folder.disk()
    }

    pub fn memory_used(&self) -> Size {
        Size(files::allocated(&self.folder.ram()))
    }

    pub fn disk_used(&self) -> Size {
        Size(files::allocated(&self.folder.disk()) + files::allocated(&self.folder.state()))
    }

    pub fn used(&self) -> Size {
        Size(self.folder.used_bytes())
    }

    pub fn last_used(&self) -> Option<Timestamp> {
        let modified = std::fs::metadata(self.folder.path().join(USED)).ok()?;
        Timestamp::try_from(modified.modified().ok()?).ok()
    }

    /// Remembers the use. Not worth failing for.
    pub fn touch(&self) {
        if let Err(err) = std::fs::write(self.folder.path().join(USED), b"") {
            tracing::debug!(id = self.id, %err, "use not recorded");
        }
    }
}

/// Where a template is made: nobody finds it yet.
#[derive(Debug, Clone)]
pub struct Stage {
    pub folder: Folder,
    layer: Uuid,
    in_memory: bool,
}

pub struct Shelf {
    layout: Layout,
    held: Mutex<BTreeMap<String, Arc<Template>>>,
    /// What is being made now.
    building: Mutex<Option<Arc<Template>>>,
}

impl Shelf {
    /// Reads what is there, and sweeps what was left half-way.
    pub fn open(layout: &Layout) -> Result<Self> {
        let shelf = Self {
            layout: layout.clone(),
            held: Mutex::default(),
            building: Mutex::default(),
        };
        let root = layout.templates();
        for folder in [&root, &layout.layers()] {
            files::create_folder(folder, 0o700)?;
        }
        let what = format!("Looking through {}", root.display());
        for entry in std::fs::read_dir(&root).io(&what)? {
            let path = entry.io(&what)?.path();
            if !path.is_dir() {
                tracing::warn!(path = %path.display(), "is no template of ours; it stays");
                continue;
            }
            let name = path.file_name().map(|n| n.to_string_lossy().into_owned());
            let name = name.unwrap_or_default();
            match shelf.load(&path, &name) {
                Ok(template) => {
                    lock(&shelf.held).insert(name, Arc::new(template));
                }
                Err(err) => {
                    tracing::warn!(id = name, %err, "what is left of a template is removed");
                    shelf.erase(&path, &name)?;
                }
            }
        }
        Ok(shelf)
    }

    /// A daemon that was killed may have left a memory to a QEMU's user for the moment of its opening.
    pub async fn take_back_loans(&self) {
        for template in self.all() {
            if let Err(err) = loan::take_back(&template.folder.ram()).await {
                tracing::warn!(id = template.id, %err, "a template's memory can't be taken back");
            }
        }
    }

    fn load(&self, path: &Path, name: &str) -> Result<Template> {
        let (folder, manifest) = Folder::read(path)?;
        // The file of the memory is opened and removed by its name: it must be one of ours.
        let ours = [path.join("ram"), self.memory(name)];
        if name.starts_with('.') || manifest.key.id() != name || !ours.contains(&folder.ram()) {
            return Err(Error::new(Code::NoTemplate, "It is not what its name says"));
        }
        // A tmpfs is empty after the host was started anew.
        if !folder.ram().exists() {
            return Err(Error::new(Code::NoTemplate, "Its memory is gone"));
        }
        self.template(folder, manifest)
    }

    fn template(&self, folder: Folder, manifest: Manifest) -> Result<Template> {
        let layer = layer_of(&self.layout, &folder.disk())
            .ok_or_else(|| Error::new(Code::NoTemplate, "Its disk is no layer"))?;
        Ok(Template {
            id: manifest.key.id(),
            state: TemplateState::Ready,
            created_at: manifest.created_at.parse().unwrap_or_default(),
            in_memory: folder.ram().starts_with(&self.layout.memory),
            layer: Layer(layer),
            key: manifest.key,
            folder,
        })
    }

    fn memory(&self, id: &str) -> PathBuf {
        self.layout.memory.join(format!("{id}.ram"))
    }

    /// Makes ready to make a template.
    pub fn stage(&self, key: &TemplateKey, in_memory: bool, now: Timestamp) -> Result<Stage> {
        let id = key.id();
        let path = self.layout.templates().join(format!(".{id}"));
        self.erase(&path, &id)?;
        files::create_folder(&path, 0o700)?;
        let ram = match in_memory {
            true => {
                files::create_own_folder(&self.layout.memory, 0o700)?;
                self.memory(&id)
            }
            false => path.join("ram"),
        };
        let layer = Uuid::new_v4();
        let folder = Folder::new(path, ram, self.layout.layer(layer));
        *lock(&self.building) = Some(Arc::new(Template {
            id,
            state: TemplateState::Building,
            key: key.clone(),
            folder: folder.clone(),
            layer: Layer(layer),
            created_at: now,
            in_memory,
        }));
        Ok(Stage {
            folder,
            layer,
            in_memory,
        })
    }

    /// Gives a finished stage its name: from now on launches find it.
    pub fn publish(&self, stage: &Stage, key: &TemplateKey, now: Timestamp) -> Result<()> {
        let id = key.id();
        let root = self.layout.templates();
        let path = root.join(&id);
        // Something damaged may have its name still.
        files::remove_folder(&path)?;
        std::fs::rename(stage.folder.path(), &path).io(format_args!("Publishing template {id}"))?;
        files::sync_folder(&root)?;
        let ram = match stage.in_memory {
            true => self.memory(&id),
            false => path.join("ram"),
        };
        let folder = Folder::new(path, ram, self.layout.layer(stage.layer));
        let manifest = folder.finish(key, &now.to_string())?;
        let template = self.template(folder, manifest)?;
        lock(&self.held).insert(id, Arc::new(template));
        *lock(&self.building) = None;
        Ok(())
    }

    /// Throws a stage away.
    pub fn abandon(&self, stage: &Stage, key: &TemplateKey) {
        *lock(&self.building) = None;
        let gone = self
            .erase(stage.folder.path(), &key.id())
            .and_then(|()| files::remove_file(&stage.folder.disk()));
        if let Err(err) = gone {
            tracing::error!(id = key.id(), %err, "a template that was not finished can't be removed");
        }
    }

    /// Those that launches use, and the one that is being made.
    pub fn all(&self) -> Vec<Arc<Template>> {
        let mut all: Vec<_> = lock(&self.held).values().cloned().collect();
        all.extend(lock(&self.building).clone());
        all
    }

    /// By id, or by the first digits of just one id.
    pub fn find(&self, id: &str) -> Result<Arc<Template>> {
        let mut found = self.all();
        found.retain(|template| !id.is_empty() && template.id.starts_with(id));
        match (found.pop(), found.pop()) {
            (Some(template), None) => Ok(template),
            _ => Err(not_found(id)),
        }
    }

    /// The one that just this key asks for.
    pub fn ready(&self, key: &TemplateKey) -> Option<Arc<Template>> {
        lock(&self.held).get(&key.id()).cloned()
    }

    /// Removes a template; its disk layer is the caller's to drop. Returns it, and the bytes that are
    /// free now.
    pub fn discard(&self, id: &str) -> Result<(Layer, Size)> {
        let mut held = lock(&self.held);
        let template = held.get(id).cloned().ok_or_else(|| not_found(id))?;
        // One reference is the shelf's, one is ours.
        if Arc::strong_count(&template) > 2 {
            return Err(Error::new(
                Code::WrongState,
                format!("template \"{id}\" is being used by a launch"),
            )
            .advise("Try again when the launch has ended."));
        }
        let freed =
            Size(template.memory_used().bytes() + files::allocated(&template.folder.state()));
        let going = self.layout.templates().join(format!(".gone-{id}"));
        std::fs::rename(template.folder.path(), &going)
            .io(format_args!("Removing template {id}"))?;
        held.remove(id);
        // A file system takes its time for a memory, and launches look here meanwhile.
        drop(held);
        self.erase(&going, id)?;
        Ok((template.layer, freed))
    }

    fn erase(&self, folder: &Path, name: &str) -> Result<()> {
        let id = name.trim_start_matches(".gone-").trim_start_matches('.');
        files::remove_file(&self.memory(id))?;
        files::remove_folder(folder)
    }
}

/// The layer whose file this is.
fn layer_of(layout: &Layout, disk: &Path) -> Option<Uuid> {
    let id = disk.file_stem()?.to_str()?.parse().ok()?;
    (layout.layer(id) == disk).then_some(id)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
