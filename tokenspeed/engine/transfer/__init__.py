"""A prompt's keys, values and state, from the engine that prefilled it to the one that decodes it.

What moves is a *unit*: the pages of the prompt that the decoder lacks, and one state slot (recurrent state, ring of
updates, convolution window, and for the MTP head the trunk's last state). Both lie in arenas of plain bytes that are
laid out alike in every engine of one model, so a transfer is a list of (arena, offset, length) and a place for each.

Five calls (`endpoint.Endpoint`), all made by the engine's thread and none of them waiting:

    register   let peers read the arenas, and listen
    offer      a room: what of a prompt is there to be read; again whenever there is more of it
    pull       bring what a room offers into pages and a slot that were set aside for it
    poll       what has ended since, and why
    cancel     give up a room or a pull

The decoder asks, the prefiller answers, and pages are read while later ones are still computed:

    decoder                          prefiller
    Hello  version, identity    ->
                                <-   Welcome, or Refused: another version, model, layout, dtype or page size
    Ask    room, what it knows  ->
                                <-   Ready: which pages lie where, and the state once it is there; Waiting; Gone
    Read   parts                ->
                                <-   Data          (or none of these two: CUDA IPC reads by itself)
    Done   room                 ->
                                <-   Closed        what was read is whole, and the room is over
    Leave  room                 ->                 it is not wanted any more

Nothing but Closed makes what was read usable: pages that a prefiller took back meanwhile change the room's epoch, and
then everything is read again. Whoever hears nothing of a room for its lease gives it up and frees what it holds.
"""
