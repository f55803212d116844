# Writes the commit of the sources as a header: cmake -DSOURCE=DIR -DHEADER=FILE -P commit.cmake
# The header is touched only when it changes, so that a commit rebuilds one file.
set(commit "$Format:%H$")  # `git archive` fills this in (.gitattributes)
if(commit MATCHES "Format")
  set(commit "unknown")  # an archive of another kind
endif()
if(EXISTS ${SOURCE}/.git)  # and not that of a folder above
  execute_process(
    COMMAND git --no-optional-locks -C ${SOURCE} describe --always --abbrev=40 --exclude=* --dirty
    OUTPUT_VARIABLE described OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE failed)
  if(NOT failed)
    set(commit ${described})
  endif()
endif()
file(CONFIGURE OUTPUT ${HEADER} CONTENT [[
#pragma once
inline constexpr const char* kCommit = "@commit@";
]] @ONLY)
